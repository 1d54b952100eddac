"""`jquant inspect`."""

from jquant.commands.display import stdout
from jquant.folders import open_abstract, read_report
from jquant.inspection import inspect_model
from jquant.tables import facts_table


def run(model: str, /) -> None:
    """List the linears of a checkpoint: format, bits per weight, relative error; only headers are read.

    Args:
      model: a jquant checkpoint, a Hugging Face folder, a GGUF file or a hub id.
    """
    stdout().print(facts_table(inspect_model(open_abstract(model), read_report(model)), model))
