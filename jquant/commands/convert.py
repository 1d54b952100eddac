"""`jquant convert`."""

from pathlib import Path

from convert.huggingface import StoredDtype
from jquant.commands.display import show_progress, stdout
from jquant.pipeline import convert_checkpoint


def run(source: str, out: Path, /, *, dtype: StoredDtype = "auto") -> None:
    """Write a model as a jquant checkpoint, with its tokenizer.

    Args:
      source: a Hugging Face folder, a GGUF file, or a hub id such as Qwen/Qwen3-0.6B.
      out: the folder to make.
      dtype: of the arrays; auto keeps what is stored.
    """
    with show_progress() as on_progress:
        model = convert_checkpoint(source, out, dtype=dtype, on_progress=on_progress)
    stdout().print(
        f"{out}: {model.config.model_type}, {model.config.num_hidden_layers} blocks", markup=False, highlight=False
    )
