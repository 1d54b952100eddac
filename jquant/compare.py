"""One model by many recipes: each quantized, saved, loaded again and measured on the same windows; one table.

A row is kept as soon as it is measured, under a name that holds a digest of all that decides it: model, recipe,
calibration windows, evaluation, versions and device. The same call goes on after the last of them, within a recipe
after its last block; other recipes or another evaluation add rows. Products are float32 throughout, so that rows differ
by method and not by device; but for those that a target's kernels make when results are measured.

By default each Hessian is the one of its own run: a block's inputs come from the quantized blocks before it, so no two
recipes have the same. With `share_hessians` every method solves on the inputs that the source model gives, whose
Hessians are computed once for each site and kept on disk until the table is finished: faster, and the solves
alone are compared. Published figures are those of the default.
"""

import contextlib
import csv
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import jax

from convert.huggingface import StoredDtype
from jquant.blocks import BlockPass, QuantizeWeights
from jquant.checkpoint import digest as model_digest
from jquant.checkpoint import is_checkpoint, recorded_digest
from jquant.data import PYTHON_DOCS
from jquant.errors import CheckpointError, DataError, JquantError, RecipeError
from jquant.folders import open_abstract, open_model, read_report, write_text
from jquant.inspection import inspect_model
from jquant.measure import ModelFigures, measure
from jquant.passes import Sequential
from jquant.pipeline import WINDOWS, quantize
from jquant.plan import plan
from jquant.progress import OnProgress, Progress, ignore
from jquant.recipe import Calibration, Recipe, digest
from jquant.targets import TargetName, choose_target

BASELINE: Final = "full precision"
_ROWS: Final = "rows"
_WORK: Final = "work"
_STATISTICS: Final = "statistics"
_KEY_LENGTH: Final = 12  # hexadecimal digits of a digest in a file's name
_VERSIONS: Final = ("jquant", "jax", "jaxlib")
_TITLES: Final = ("recipe", "bits per weight", "bytes", "perplexity", "quantize seconds")


@dataclass(frozen=True)
class Evaluation:
    """What every row is measured on.

    Attributes:
      dataset: a name or path for `jquant.data.load_text`; its evaluation split is used.
      windows: how many windows; None for all of the text.
      length: tokens of a window.
      target: whose kernels multiply: see `jquant.targets.choose_target`.
    """

    dataset: str = PYTHON_DOCS
    windows: int | None = None
    length: int = 2048
    target: TargetName = "reference"

    def describe(self) -> str:
        """Returns the evaluation in words."""
        count = "all" if self.windows is None else self.windows
        text = f"perplexity of {count} windows of {self.length} tokens of {self.dataset}, evaluation split"
        return text if self.target == "reference" else f"{text}, kernels of {self.target}"


def compare(
    source: str | Path,
    out: Path,
    recipes: Sequence[Recipe],
    evaluation: Evaluation,
    *,
    folder: Path | None = None,
    dtype: StoredDtype = "auto",
    share_hessians: bool = False,
    on_progress: OnProgress = ignore,
) -> tuple[ModelFigures, ...]:
    """Quantizes a model by each recipe and measures all results and the model itself.

    Args:
      source: a Hugging Face folder, a GGUF file, a hub id, or an unquantized jquant checkpoint.
      out: folder for rows, tables and unfinished work; what it holds of this comparison is used.
      recipes: the methods, with different names.
      evaluation: what perplexity is measured on.
      folder: where the files of named data sets lie; None to get them from the hub.
      dtype: of a foreign checkpoint's arrays.
      share_hessians: whether all recipes solve on the source model's own activations (`on_source_inputs`).
      on_progress: called at each stage.

    Returns:
      The rows in the order of the recipes, full precision first; `table.md`, `table.csv` and `table.json` in `out` hold
      the same and are renewed after each row.

    Raises:
      RecipeError: two recipes have one name, one does not fit the model, or the target is not there; said before any
        work.
      JquantError: a quantization or a measurement failed; the recipe is named, finished rows are kept.
    """
    _check_names(recipes)
    recipes = [on_source_inputs(one) for one in recipes] if share_hessians else recipes
    abstract = open_abstract(source, dtype=dtype)
    chosen = choose_target(evaluation.target, abstract.embed_tokens.dtype)
    evaluation = dataclasses.replace(evaluation, target=cast(TargetName, chosen.value))
    for one in recipes:
        with _named(one.name):
            plan(abstract, one)
    _make(out / _ROWS)
    on_progress(Progress("reading the model"))
    identity = recorded_digest(source) if is_checkpoint(source) else model_digest(open_model(source, dtype=dtype))
    rows: list[ModelFigures] = []
    for recipe in (None, *recipes):
        name = BASELINE if recipe is None else recipe.name
        key = _key(identity, recipe, evaluation, folder)
        known = out / _ROWS / f"{_file_name(name)}-{key}.json"
        with _named(name), jax.default_matmul_precision("highest"):
            if not known.exists():
                on_progress(Progress(f"{name} ({len(rows) + 1} of {len(recipes) + 1})"))
                checkpoint = out / _WORK / f"{_file_name(name)}-{key}"
                row = _run(source, checkpoint, recipe, evaluation, folder, dtype, on_progress)
                write_text(known, json.dumps(dataclasses.asdict(row), indent=1))
                shutil.rmtree(checkpoint, ignore_errors=True)
            rows.append(_read(known))
        _write_tables(out, rows, evaluation, source)
    shutil.rmtree(out / _STATISTICS, ignore_errors=True)
    return tuple(rows)


def on_source_inputs(recipe: Recipe) -> Recipe:
    """Returns a recipe whose statistics are those of the source model's own activations, for all sites at once.

    Example:
      >>> from jquant.recipe import load_recipe
      >>> on_source_inputs(load_recipe("gptq-w4")).passes[0].passes[0].inputs
      'source'
    """

    def change(one: BlockPass) -> BlockPass:
        if not isinstance(one, QuantizeWeights) or not one.wanted():
            return one
        return dataclasses.replace(one, sequence="per_block", inputs="source")

    passes = (
        Sequential(tuple(map(change, one.passes))) if isinstance(one, Sequential) else one for one in recipe.passes
    )
    return dataclasses.replace(recipe, passes=tuple(passes))


def share_calibration(
    recipe: Recipe, *, file: Path | None = None, samples: int | None = None, length: int | None = None
) -> Recipe:
    """Returns a recipe that calibrates on given windows; one that does not calibrate stays as it is.

    Args:
      recipe: the recipe.
      file: a .npy file of windows of tokens; None for the recipe's own text.
      samples: how many windows; None for the recipe's own number.
      length: tokens of a window; None for the recipe's own.

    Raises:
      DataError: the file's name does not end in .npy.

    Example:
      >>> from jquant.recipe import load_recipe
      >>> share_calibration(load_recipe("gptq-w4"), samples=16).calibration.samples
      16
    """
    if file is not None and file.suffix != WINDOWS:
        raise DataError(f"{file}: windows of tokens are a {WINDOWS} file; a text is a recipe's calibration.dataset")
    if recipe.calibration is None:
        return recipe
    own = recipe.calibration
    shared = Calibration(str(file or own.dataset), samples or own.samples, length or own.length)
    return dataclasses.replace(recipe, calibration=shared)


def markdown(rows: Sequence[ModelFigures], caption: str) -> str:
    """Returns the rows as a table in Markdown."""
    lines = [_TITLES, ("---", *["---:"] * (len(_TITLES) - 1)), *map(_cells, rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + f"\n\n{caption}\n"


def comma_separated(rows: Sequence[ModelFigures]) -> str:
    """Returns the rows as CSV, in full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_TITLES)
    writer.writerows((row.name, row.bits_per_weight, row.nbytes, row.perplexity, row.seconds) for row in rows)
    return text.getvalue()


def _run(
    source: str | Path,
    checkpoint: Path,
    recipe: Recipe | None,
    evaluation: Evaluation,
    folder: Path | None,
    dtype: StoredDtype,
    on_progress: OnProgress,
) -> ModelFigures:
    """Makes one row: quantizes if there is a recipe and no result of it yet, and measures what was saved."""
    where: str | Path = source if recipe is None else checkpoint
    if recipe is not None and not is_checkpoint(checkpoint):
        statistics = checkpoint.parent.parent / _STATISTICS
        quantize(source, checkpoint, recipe, folder=folder, dtype=dtype, statistics=statistics, on_progress=on_progress)
    measured = measure(
        where,
        evaluation.dataset,
        length=evaluation.length,
        windows=evaluation.windows,
        folder=folder,
        target=evaluation.target,
        on_progress=on_progress,
    )
    facts = inspect_model(open_abstract(where))
    seconds = 0.0 if recipe is None else _seconds(checkpoint)
    name = BASELINE if recipe is None else recipe.name
    return ModelFigures(name, measured.perplexity.value, facts.bits_per_weight(), facts.nbytes, seconds)


def _seconds(checkpoint: Path) -> float:
    """Returns the time of a run; of a resumed one that of all its blocks, as far as that is longer."""
    report = read_report(checkpoint)
    return max(float(report["details"]["seconds"]), sum(block["seconds"] for block in report["blocks"]))


def _key(identity: str, recipe: Recipe | None, evaluation: Evaluation, folder: Path | None) -> str:
    """Returns a short digest of what decides a row."""
    windows = recipe.calibration.dataset if recipe is not None and recipe.calibration is not None else ""
    parts = [
        identity,
        "" if recipe is None else digest(recipe),
        _sha256(Path(windows)) if windows.endswith(WINDOWS) else windows,
        str(folder),
        json.dumps(dataclasses.asdict(evaluation)),
        jax.devices()[0].device_kind,
        *map(importlib.metadata.version, _VERSIONS),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:_KEY_LENGTH]


def _sha256(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{file} cannot be read as windows of tokens: {error}") from error


def _read(known: Path) -> ModelFigures:
    try:
        return ModelFigures(**json.loads(known.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{known} cannot be read ({error!r}); delete it and run again") from error


def _write_tables(out: Path, rows: Sequence[ModelFigures], evaluation: Evaluation, source: str | Path) -> None:
    caption = f"{source}: {evaluation.describe()}, on {jax.devices()[0].device_kind}."
    write_text(out / "table.md", markdown(rows, caption))
    write_text(out / "table.csv", comma_separated(rows))
    content = {
        "source": str(source),
        "evaluation": dataclasses.asdict(evaluation),
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    write_text(out / "table.json", json.dumps(content, indent=1))


def _cells(row: ModelFigures) -> tuple[str, ...]:
    return (row.name, f"{row.bits_per_weight:.3f}", f"{row.nbytes:,}", f"{row.perplexity:.3f}", f"{row.seconds:.0f}")


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Adds the row's name to an error."""
    try:
        yield
    except JquantError as error:
        raise type(error)(f"{name}: {error}") from error


def _check_names(recipes: Sequence[Recipe]) -> None:
    names = [BASELINE, *(recipe.name for recipe in recipes)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"several rows would be called {', '.join(twice)}; give each recipe a `name` of its own")


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error}. Choose a folder that you may write to") from error
