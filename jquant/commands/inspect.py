"""`jquant inspect`."""

from typing import Literal

from jquant.commands.display import stdout
from jquant.folders import open_abstract, read_report
from jquant.inspection import inspect_model
from jquant.machines import Target
from jquant.sharding import parse_axes
from jquant.tables import facts_table


def run(
    model: str,
    /,
    *,
    target: Literal["h100", "h200", "h100+tokamax", "h200+tokamax"] | None = None,
    mesh: str | None = None,
) -> None:
    """List the linears of a checkpoint: format, bits per weight, relative error; only headers are read.

    Args:
      model: a jquant checkpoint, a Hugging Face folder, a GGUF file or a hub id.
      target: name what would multiply each linear there, and why where it is no kernel.
      mesh: name what each device would have of each linear, over devices such as data=2,tensor=4, which need not be
        here. Each device multiplies its part by the kernels that one device would take.
    """
    chosen = None if target is None else Target(target)
    axes = None if mesh is None else parse_axes(mesh)
    facts = inspect_model(open_abstract(model), read_report(model), target=chosen, axes=axes)
    stdout().print(facts_table(facts, model))
