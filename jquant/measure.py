"""Measurements of a checkpoint: perplexity on a named text, needles found; opening, tokens and model put together."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jax

from convert import load_tokenizer
from eval import NeedleGrid, Perplexity, perplexity
from jquant.data import load_text, token_windows
from jquant.errors import DataError, RecipeError
from jquant.folders import make_ready, open_abstract, open_for_use, open_model
from jquant.inspection import CacheFacts, measure_cache
from jquant.models import Llama
from jquant.passes import Context, run_passes
from jquant.progress import OnProgress, Progress, ignore
from jquant.recipe import Recipe
from jquant.targets import TargetName, choose_target, describe_products

OWN: Final = "as it is"  # the row of the model that no recipe has changed


@dataclass(frozen=True)
class Measurement:
    """A perplexity and what it was measured on.

    Attributes:
      perplexity: the figure and its windows.
      dataset: name or path of the text.
      provenance: where the text came from, as `jquant.data.Text` has it.
      seconds: time that the windows took, compilation included.
      products: what multiplied the linears, as `describe_products` says it.
    """

    perplexity: Perplexity
    dataset: str
    provenance: dict[str, str]
    seconds: float
    products: str


@dataclass(frozen=True)
class ModelFigures:
    """What a table says of one model.

    Attributes:
      name: how the table calls it.
      perplexity: on the text that all models of the table are measured on.
      bits_per_weight: of the linears of all blocks.
      nbytes: of all arrays, the embedding table among them.
      seconds: what converting or quantizing it took.
    """

    name: str
    perplexity: float
    bits_per_weight: float
    nbytes: int
    seconds: float


def measure(
    source: str | Path,
    dataset: str,
    *,
    length: int = 2048,
    windows: int | None = None,
    folder: Path | None = None,
    target: TargetName = "reference",
    on_progress: OnProgress = ignore,
) -> Measurement:
    """Measures the perplexity of a checkpoint on the evaluation split of a text.

    Args:
      source: what `open_model` takes.
      dataset: a name or path for `jquant.data.load_text`.
      length: tokens of a window.
      windows: how many; None for all of the text.
      folder: where the files of a named data set lie; None to get it from the hub.
      target: whose kernels multiply: see `jquant.targets.choose_target`.
      on_progress: called after each window.

    Raises:
      RecipeError: the target is not there.
      DataError: the text cannot be had or is too short.
      CheckpointError: the model cannot be read.
      ConversionError: the same, for a foreign one.
    """
    text = load_text(dataset, "evaluation", folder=folder)
    tokens = token_windows(text, load_tokenizer(source), length=length, count=windows)
    on_progress(Progress("reading the model"))
    model = open_for_use(source, target=target)
    started = time.monotonic()
    figure = perplexity(
        model,
        tokens,
        on_window=lambda done, total, value: on_progress(Progress(f"perplexity {value:.3f} so far", done, total)),
    )
    return Measurement(figure, dataset, dict(text.provenance), time.monotonic() - started, describe_products(model))


@dataclass(frozen=True)
class NeedleRow:
    """What one model found.

    Attributes:
      name: `OWN`, or the recipe's.
      grid: what was found where.
      cache: the KV codec and what it takes.
      seconds: time that the answers took, compilation included.
      products: what multiplied the linears, as `describe_products` says it.
    """

    name: str
    grid: NeedleGrid
    cache: CacheFacts
    seconds: float
    products: str = "XLA"


def measure_needles(
    source: str | Path,
    recipes: Sequence[Recipe],
    ask: Callable[[Llama, Any], NeedleGrid],
    *,
    target: TargetName = "reference",
    on_progress: OnProgress = ignore,
) -> Iterator[NeedleRow]:
    """Yields what a checkpoint finds as it is, and after each of some recipes that need no calibration.

    Args:
      source: what `open_model` takes.
      recipes: each is applied to the model as it is.
      ask: puts the questions to a model, given its tokenizer too.
      target: whose kernels multiply: see `jquant.targets.choose_target`.
      on_progress: called at each model.

    Raises:
      RecipeError: a recipe needs calibration, or the target is not there.
      CheckpointError: the model cannot be read.
      ConversionError: the same, for a foreign one.
    """
    calibrated = [one.name for one in recipes if one.calibration is not None]
    if calibrated:
        raise RecipeError(f"{calibrated[0]} needs calibration: quantize by it first, and give its checkpoint instead")
    choose_target(target, open_abstract(source).embed_tokens.dtype)
    on_progress(Progress("reading the model"))
    model, tokenizer = open_model(source), load_tokenizer(source)
    for recipe in (None, *recipes):
        name = OWN if recipe is None else recipe.name
        on_progress(Progress(name))
        changed = model
        if recipe is not None:
            changed, _ = run_passes(recipe.passes, model, Context(jax.random.key(recipe.seed)))
        cache, started = measure_cache(changed), time.monotonic()
        ready = make_ready(changed, target)
        grid = ask(ready, tokenizer)
        yield NeedleRow(name, grid, cache, time.monotonic() - started, describe_products(ready))


def read_needle_rows(path: Path) -> tuple[NeedleRow, ...]:
    """Reads the rows that `jquant needle --json` wrote.

    Raises:
      DataError: the file is no such result.
    """
    try:
        rows = json.loads(path.read_text("utf-8"))["rows"]
        return tuple(
            NeedleRow(
                row["name"],
                NeedleGrid(**{name: _tuples(value) for name, value in row["grid"].items()}),
                CacheFacts(**row["cache"]),
                row["seconds"],
                row.get("products", "XLA"),
            )
            for row in rows
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} has no needles found ({error!r}): give what `jquant needle --json` wrote") from error


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
