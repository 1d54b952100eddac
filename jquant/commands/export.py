"""`jquant export`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from convert import Consumer, ExportFormat
from convert.huggingface import StoredDtype
from jquant.commands.display import show_progress, stdout
from jquant.pipeline import export_checkpoint


def run(
    model: str,
    out: Path,
    /,
    *,
    format: ExportFormat,
    for_: Annotated[Consumer, Parameter(name="--for")] = "transformers",
    dtype: StoredDtype = "auto",
) -> None:
    """Write a checkpoint as a Hugging Face folder, with its tokenizer and all other files, and verify it.

    Args:
      model: a jquant checkpoint, a Hugging Face folder, a GGUF file or a hub id.
      out: the folder to make.
      format: compressed-tensors (2 to 8 bits, activations), gptq (2, 3, 4, 8 bits), or safetensors (dequantized).
      for_: the reader that the folder is checked for.
      dtype: of the arrays that are not packed, such as bfloat16; auto keeps what they have.
    """
    with show_progress() as on_progress:
        verified = export_checkpoint(model, out, format=format, consumer=for_, dtype=dtype, on_progress=on_progress)
    console = stdout()
    console.print(
        f"{out}: {format}, {verified.packed} linears packed, {verified.tensors} tensors, verified for {for_}",
        markup=False,
        highlight=False,
    )
    for note in verified.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
