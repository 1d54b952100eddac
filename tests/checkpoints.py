"""Whole tiny checkpoints for tests: a random model of the Llama family with a tokenizer of one token a character."""

from pathlib import Path
from typing import Any, Final

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jquant.models import LlamaConfig, tiny_hf_config
from tests.convert.folders import random_tensors, write_shards

TEMPLATE: Final = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
VOCABULARY: Final = 128  # ASCII; what is not is "\x1a"


def write_tokenizer(folder: Path) -> None:
    """Write the files of a tokenizer whose ids are character codes, with a chat template."""
    letters = {chr(code): code for code in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="\x1a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="\x04", unk_token="\x1a")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def write_checkpoint(folder: Path, *, tensors: dict[str, Any] | None = None, **settings: Any) -> Path:
    """Write a Hugging Face folder in two shards; `settings` go to its config, `tensors` replace some of its own."""
    config = {**tiny_hf_config("llama2"), "vocab_size": VOCABULARY, **settings}
    write_shards(folder, config, random_tensors(LlamaConfig.from_hf(config)) | (tensors or {}), 2)
    write_tokenizer(folder)
    return folder
