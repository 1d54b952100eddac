"""`jquant compare`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from convert.huggingface import StoredDtype
from jquant.commands.display import show_progress, stdout
from jquant.compare import Evaluation, compare, share_calibration
from jquant.data import PYTHON_DOCS
from jquant.recipe import load_recipe
from jquant.tables import figures_table
from jquant.targets import TargetName


def run(
    source: str,
    out: Path,
    /,
    *,
    recipe: Annotated[Sequence[str], Parameter(negative="")],
    calibration_file: Path | None = None,
    samples: int | None = None,
    sample_length: int | None = None,
    perplexity: str = PYTHON_DOCS,
    windows: int | None = None,
    length: int = 2048,
    data: Path | None = None,
    dtype: StoredDtype = "auto",
    share_hessians: bool = False,
    target: TargetName = "auto",
) -> None:
    """Quantize a model by several recipes, measure each result on the same windows, and print one table.

    Finished rows are kept in the output folder: the same command goes on where it was stopped, other recipes add rows.

    Args:
      source: a Hugging Face folder, a GGUF file, a hub id, or an unquantized jquant checkpoint.
      out: the folder for rows and for table.md, table.csv and table.json.
      recipe: a preset such as gptq-w4g128, or a YAML file; may be given several times.
      calibration_file: a .npy file of token ids [windows, tokens] for all recipes that calibrate.
      samples: calibration windows, instead of the recipes' own number.
      sample_length: tokens of a calibration window, instead of the recipes' own number.
      perplexity: the text: python-docs, wikitext2, c4, or a file; its evaluation split is used.
      windows: how many windows are measured; all of the text if not given.
      length: tokens in a measured window.
      data: the folder where the files of named data sets lie, instead of the hub.
      dtype: of the model's arrays; auto keeps what is stored.
      target: whose kernels multiply when results are measured; auto is the GPU's own for bfloat16 on an H100 or H200.
      share_hessians: solve every recipe on the source model's own activations, whose Hessians are computed once.
    """
    chosen = [
        share_calibration(load_recipe(name), file=calibration_file, samples=samples, length=sample_length)
        for name in recipe
    ]
    evaluation = Evaluation(perplexity, windows, length, target=target)
    with show_progress() as on_progress:
        rows = compare(
            source,
            out,
            chosen,
            evaluation,
            folder=data,
            dtype=dtype,
            share_hessians=share_hessians,
            on_progress=on_progress,
        )
    console = stdout()
    console.print(figures_table(rows, source, evaluation.describe()))
    console.print(f"saved in {out}: table.md, table.csv and table.json", markup=False, highlight=False)
