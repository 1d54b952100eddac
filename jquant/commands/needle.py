"""`jquant needle`."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from cyclopts import Parameter

from eval import (
    NEEDLES,
    NeedleGrid,
    NeedleTest,
    OnCell,
    draw_map,
    five_needles,
    needle_grid,
    require_plots,
    text_map,
)
from jquant.commands.display import show_progress, stdout
from jquant.data import PYTHON_DOCS, load_text
from jquant.errors import DataError, RecipeError
from jquant.folders import make_writable, write_text
from jquant.machines import TargetName
from jquant.measure import NeedleRow, measure_needles, read_needle_rows
from jquant.models import Llama
from jquant.progress import OnProgress, Progress
from jquant.recipe import load_recipe
from jquant.tables import needle_table

_SEVERAL: Final = Parameter(negative="", consume_multiple=True)
_COPIES: Final = 5  # QLLM-INFER's


def run(
    model: str,
    /,
    *,
    recipe: Annotated[Sequence[str], _SEVERAL] = (),
    protocol: Literal["grid", "qllm-infer"] = "grid",
    lengths: Annotated[Sequence[int], _SEVERAL] = (1024, 2048, 4096, 8192),
    depths: Annotated[Sequence[float], _SEVERAL] = (0, 25, 50, 75, 100),
    needles: int = len(NEEDLES),
    arrangement: Literal["alone", "together"] = "alone",
    copies: int = _COPIES,
    text: str = PYTHON_DOCS,
    data: Path | None = None,
    batch_size: int = 1,
    prefill_chunk: int | None = None,
    target: TargetName = "auto",
    json_: Annotated[Path | None, Parameter(name="--json")] = None,
    plot: Path | None = None,
) -> None:
    """Hide pass keys in long texts and ask for them: the share that is found, for each length and depth.

    Args:
      model: a jquant checkpoint, a Hugging Face folder, a GGUF file or a hub id; or a result of --json, to show it.
      recipe: presets or YAML files without calibration, such as kivi-2: one more row each, beside the model as it is.
      protocol: grid, after LLMTest_NeedleInAHaystack; or qllm-infer, five keys in the middle of a line repeated.
      lengths: tokens of prompt and answer together.
      depths: per cent of the text that stand before the needle.
      needles: how many of the five keys are asked for.
      arrangement: alone, one needle in each text; together, all of them, spread from the depth on.
      copies: of qllm-infer's text of 127 lines, before the needle and behind it.
      text: python-docs, wikitext2, c4, or a file; its evaluation split is the haystack.
      data: the folder where the files of a named data set lie, instead of the hub.
      batch_size: prompts that are read at once.
      prefill_chunk: tokens of a prompt that go through the model at once, to bound memory; all if not given.
      target: whose kernels multiply; auto is the GPU's own for models in bfloat16 on an H100 or H200. With +tokamax,
        prompts attend by tokamax (jquant[tokamax]), not by cuDNN.
      json_: a file to write the result to, after each row.
      plot: a PNG to draw the heat maps to; needs matplotlib.
    """
    _check_outputs(json_, plot)
    if model.endswith(".json"):
        if recipe or json_ is not None:
            raise RecipeError(f"{model} is a result, which is shown as it is: leave --recipe and --json out")
        _show(read_needle_rows(Path(model)), plot)
        return
    chosen = [load_recipe(name) for name in recipe]
    if not 1 <= needles <= len(NEEDLES):
        raise DataError(f"--needles {needles}: give 1 to {len(NEEDLES)}")
    test = NeedleTest(tuple(lengths), tuple(map(float, depths)), NEEDLES[:needles], arrangement)
    grid_options = test != NeedleTest() or text != PYTHON_DOCS or data is not None
    if (protocol == "grid" and copies != _COPIES) or (protocol == "qllm-infer" and grid_options):
        raise RecipeError(
            "--copies belongs to --protocol qllm-infer; lengths, depths, needles, arrangement, text and data belong to "
            "the grid: leave out what the protocol does not use"
        )
    haystack = load_text(text, "evaluation", folder=data)
    settings: dict[str, Any] = {"model": model, "protocol": protocol, "prefill_chunk": prefill_chunk}
    if protocol == "grid":
        settings |= {"test": dataclasses.asdict(test), "text": text, "provenance": dict(haystack.provenance)}
    else:
        settings |= {"copies": copies}
    with show_progress() as on_progress:

        def ask(tree: Llama, tokenizer: Any) -> NeedleGrid:
            sizes: dict[str, Any] = {
                "batch_size": batch_size,
                "prefill_chunk": prefill_chunk,
                "on_cell": _count(on_progress),
            }
            if protocol == "grid":
                return needle_grid(tree, tokenizer, haystack.joined(), test, **sizes)
            return five_needles(tree, tokenizer, copies=copies, **sizes)

        rows = []
        for row in measure_needles(model, chosen, ask, target=target, on_progress=on_progress):
            rows.append(row)
            if json_ is not None:
                result = settings | {"rows": [dataclasses.asdict(one) for one in rows]}
                write_text(json_, json.dumps(result, indent=1))
    _show(rows, plot)


def _check_outputs(json_: Path | None, plot: Path | None) -> None:
    if plot is not None:
        require_plots()
    for path in (json_, plot):
        if path is not None:
            make_writable(path.parent)


def _count(on_progress: OnProgress) -> OnCell:
    return lambda done, total, share: on_progress(Progress(f"{100 * share:.0f} % found so far", done, total))


def _show(rows: Sequence[NeedleRow], plot: Path | None) -> None:
    console = stdout()
    console.print(needle_table(rows))
    for row in rows:
        console.print(f"\n{row.name}\n{text_map(row.grid)}", markup=False, highlight=False)
    if plot is not None:
        draw_map({row.name: row.grid for row in rows}, plot)
