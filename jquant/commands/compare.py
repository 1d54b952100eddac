"""`jquant compare`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from convert.huggingface import StoredDtype
from jquant.commands.display import show_progress, split_names, stdout
from jquant.compare import Evaluation, compare, expand, share_calibration
from jquant.comparison import read_tables
from jquant.data import PYTHON_DOCS
from jquant.errors import RecipeError
from jquant.folders import write_text
from jquant.machines import TargetName
from jquant.pages import comparison_page
from jquant.recipe import load_recipe
from jquant.tables import figures_table


def run(
    source: str,
    out: Path,
    /,
    *,
    recipe: Annotated[Sequence[str], Parameter(negative="")],
    calibration_file: Path | None = None,
    samples: int | None = None,
    sample_length: int | None = None,
    perplexity: Annotated[Sequence[str], Parameter(negative="", consume_multiple=True)] = (PYTHON_DOCS,),
    windows: int | None = None,
    length: int = 2048,
    tasks: Annotated[Sequence[str], Parameter(negative="", consume_multiple=True)] = (),
    limit: int | None = None,
    shots: int | None = None,
    data: Path | None = None,
    dtype: StoredDtype = "auto",
    share_hessians: bool = False,
    target: TargetName = "auto",
) -> None:
    """Quantize a model by several recipes, measure each result on the same windows and tasks, and print one table.

    What is done is kept in the output folder: the same command goes on where it was stopped, other recipes add rows,
    and several processes given the same command share its rows.

    Args:
      source: a Hugging Face folder, a GGUF file, a hub id, or an unquantized jquant checkpoint.
      out: the folder for rows and for table.md, table.csv, table.json and report.html.
      recipe: a preset such as gptq-w4g128, or a YAML file; may be given several times. paper-tables stands for the
        presets of QLLM-INFER's tables.
      calibration_file: a .npy file of token ids [windows, tokens] for all recipes that calibrate.
      samples: calibration windows, instead of the recipes' own number.
      sample_length: tokens of a calibration window, instead of the recipes' own number.
      perplexity: the texts, a column each: python-docs, wikitext2, c4, or files; their evaluation splits are used.
      windows: how many windows of each are measured; all of the text if not given.
      length: tokens in a measured window.
      tasks: names in lm-eval, such as boolq,arc_easy or mmlu, a column each; needs jquant[tasks].
      limit: documents of each task, the first ones; all if not given.
      shots: examples in each prompt; each task's own number if not given.
      data: the folder where the files of named texts and of tasks lie, or its text/ and tasks/, instead of the hub.
      dtype: of the model's arrays; auto keeps what is stored.
      target: whose kernels multiply when results are measured; auto is the GPU's own for bfloat16 on an H100 or H200.
        With +tokamax, prompts attend by tokamax (jquant[tokamax]), not by cuDNN.
      share_hessians: solve every recipe on the source model's own activations, whose Hessians are computed once.
    """
    chosen = [
        share_calibration(load_recipe(name), file=calibration_file, samples=samples, length=sample_length)
        for name in expand(recipe)
    ]
    names = split_names(tasks)
    if not names and (limit, shots) != (None, None):
        raise RecipeError("--limit and --shots belong to tasks: name some with --tasks")
    evaluation = Evaluation(tuple(perplexity), windows, length, target, names, limit, shots)
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
    content = read_tables(out / "table.json")
    write_text(out / "report.html", comparison_page(content))
    console = stdout()
    console.print(figures_table(rows, source, content["caption"]))
    console.print(f"saved in {out}: table.md, table.csv, table.json and report.html", markup=False, highlight=False)
