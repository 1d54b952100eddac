"""`jquant eval`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from jquant.commands.display import show_progress, stdout
from jquant.data import PYTHON_DOCS
from jquant.folders import make_writable, open_abstract, write_text
from jquant.inspection import inspect_model
from jquant.measure import measure
from jquant.tables import measurement_table
from jquant.targets import TargetName


def run(
    model: str,
    /,
    *,
    perplexity: str = PYTHON_DOCS,
    windows: int | None = None,
    length: int = 2048,
    data: Path | None = None,
    target: TargetName = "auto",
    json_: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Measure the perplexity of a model: exp of the mean, over windows, of each window's mean loss.

    Args:
      model: a jquant checkpoint, a Hugging Face folder, a GGUF file or a hub id.
      perplexity: the text: python-docs, wikitext2, c4, or a file; its evaluation split is used.
      windows: how many windows; all of the text if not given.
      length: tokens in a window.
      data: the folder where the files of a named data set lie, instead of the hub.
      target: whose kernels multiply; auto is the GPU's own for models in bfloat16 on an H100 or H200.
      json_: a file to write the result to.
    """
    if json_ is not None:
        make_writable(json_.parent)
    facts = inspect_model(open_abstract(model))
    with show_progress() as on_progress:
        measured = measure(
            model, perplexity, length=length, windows=windows, folder=data, target=target, on_progress=on_progress
        )
    stdout().print(measurement_table({model: (measured, facts)}))
    if json_ is not None:
        result = {"model": model, "bits_per_weight": facts.bits_per_weight(), **dataclasses.asdict(measured)}
        write_text(json_, json.dumps(result, indent=1))
