"""`jquant inspect`."""

from typing import Literal

from jquant.commands.display import stdout
from jquant.folders import open_abstract, read_report
from jquant.inspection import inspect_model
from jquant.tables import facts_table
from jquant.targets import Target


def run(model: str, /, *, target: Literal["h100", "h200"] | None = None) -> None:
    """List the linears of a checkpoint: format, bits per weight, relative error; only headers are read.

    Args:
      model: a jquant checkpoint, a Hugging Face folder, a GGUF file or a hub id.
      target: name what would multiply each linear there, and why where it is no kernel.
    """
    chosen = None if target is None else Target(target)
    stdout().print(facts_table(inspect_model(open_abstract(model), read_report(model), target=chosen), model))
