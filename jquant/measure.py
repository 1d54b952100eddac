"""Measurements of a checkpoint: perplexity, tasks, statistics, needles; opening, tokens and model put together."""

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jax

from convert import load_tokenizer
from eval import (
    BlockDistance,
    Divergence,
    NeedleGrid,
    Perplexity,
    TapStatistics,
    TaskOptions,
    TaskResults,
    TaskScore,
    block_distances,
    divergence,
    perplexity,
    run_tasks,
    share_basis,
    tap_statistics,
)
from jquant.checkpoint import digest
from jquant.data import load_text, token_windows
from jquant.errors import DataError, RecipeError
from jquant.folders import make_ready, open_abstract, open_for_use, open_model, stack_if_alike
from jquant.inspection import CacheFacts, measure_cache
from jquant.machines import TargetName, choose_target
from jquant.models import Llama
from jquant.passes import Context, run_passes
from jquant.progress import OnProgress, Progress, ignore
from jquant.recipe import Recipe
from jquant.targets import describe_products

_KEY_LENGTH: Final = 12  # hexadecimal digits of a digest in a file's name
_VERSIONS: Final = ("jquant", "jax", "jaxlib")
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
      perplexities: (text, perplexity) for each text that all models of the table are measured on, at least one.
      bits_per_weight: of the linears of all blocks.
      bits_per_kv_value: of the caches of all blocks, at 4096 tokens or the model's context if that is shorter.
      nbytes: of all arrays, the embedding table among them.
      seconds: what converting or quantizing it took.
      scores: of the tasks that all models of the table are measured on.
    """

    name: str
    perplexities: tuple[tuple[str, float], ...]
    bits_per_weight: float
    bits_per_kv_value: float
    nbytes: int
    seconds: float
    scores: tuple[TaskScore, ...] = ()

    def columns(self) -> dict[str, float]:
        """Return what was measured by the titles of a table: perplexities, then the quoted score of each task."""
        several = len(self.perplexities) > 1
        texts = {f"perplexity {text}" if several else "perplexity": value for text, value in self.perplexities}
        shown = (score for score in self.scores if score.quoted and not score.part)
        return texts | {f"{score.task} {score.metric}": score.value for score in shown}


def measure(
    source: str | Path,
    dataset: str,
    *,
    length: int = 2048,
    windows: int | None = None,
    folder: Path | None = None,
    model: Llama | None = None,
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
      model: the checkpoint's, where it is ready to run already; None to open it.
      target: whose kernels multiply where it is opened here: see `jquant.machines.choose_target`.
      on_progress: called after each window.

    Raises:
      RecipeError: the target is not there.
      DataError: the text cannot be had or is too short.
      CheckpointError: the model cannot be read.
      ConversionError: the same, for a foreign one.
    """
    text = load_text(dataset, "evaluation", folder=folder)
    tokens = token_windows(text, load_tokenizer(source), length=length, count=windows)
    if model is None:
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
class TaskMeasurement:
    """What tasks gave, and how they were run.

    Attributes:
      results: the scores and where their rows came from.
      options: how the tasks were run.
      seconds: time that they took, compilation included.
      products: what multiplied the linears, as `describe_products` says it.
    """

    results: TaskResults
    options: TaskOptions
    seconds: float
    products: str


def measure_tasks(
    source: str | Path,
    names: Sequence[str],
    options: TaskOptions,
    *,
    cache: Path | None = None,
    model: Llama | None = None,
    target: TargetName = "reference",
    on_progress: OnProgress = ignore,
) -> TaskMeasurement:
    """Runs lm-eval's tasks on a checkpoint.

    Args:
      source: what `open_model` takes.
      names: tasks, groups or tags of lm-eval.
      options: how they are run.
      cache: a folder for answers, where those of other models may lie too: a run that was stopped goes on after the
        last of them. None to keep nothing.
      model: the checkpoint's, where it is ready to run already; None to open it.
      target: whose kernels multiply where it is opened here: see `jquant.machines.choose_target`.
      on_progress: called after each answer.

    Raises:
      RecipeError: the target is not there.
      DataError: lm-eval is not installed, a task is unknown, or its rows cannot be had or are malformed.
      CheckpointError: the model cannot be read.
      ConversionError: the same, for a foreign one.
    """
    tokenizer = load_tokenizer(source)
    if model is None:
        on_progress(Progress("reading the model"))
        model = open_for_use(source, target=target)
    started = time.monotonic()
    results = run_tasks(
        model,
        tokenizer,
        names,
        options,
        cache=None if cache is None else cache / f"answers-{_answers_key(model)}",
        on_request=lambda done, total: on_progress(Progress("tasks: requests answered", done, total)),
    )
    return TaskMeasurement(results, options, time.monotonic() - started, describe_products(model))


def _answers_key(model: Llama) -> str:
    """Returns a short digest of what decides an answer, beside the request: the model, versions, device, precision."""
    parts = [
        digest(model),
        describe_products(model),
        jax.devices()[0].device_kind,
        str(jax.config.jax_default_matmul_precision),
        *map(importlib.metadata.version, _VERSIONS),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:_KEY_LENGTH]


@dataclass(frozen=True)
class Analysis:
    """What goes into a model's linears, and how far it is from a reference.

    Attributes:
      taps: the statistics of each block and tap.
      reference_taps: the same of the reference; empty where there is none.
      distances: of the states after each block; None where there is no reference, or where one of the models is
        rotated and the other not.
      divergence: of what both predict; None where there is no reference.
      windows: how many windows of text.
      length: tokens of each.
      dataset: name or path of the text.
      provenance: where the text came from.
    """

    taps: tuple[TapStatistics, ...]
    reference_taps: tuple[TapStatistics, ...]
    distances: tuple[BlockDistance, ...] | None
    divergence: Divergence | None
    windows: int
    length: int
    dataset: str
    provenance: dict[str, str]


def analyze(
    source: str | Path,
    dataset: str,
    *,
    against: str | Path | None = None,
    length: int = 512,
    windows: int = 4,
    folder: Path | None = None,
    on_progress: OnProgress = ignore,
) -> Analysis:
    """Analyses a checkpoint on the evaluation split of a text.

    Args:
      source: what `open_model` takes.
      dataset: a name or path for `jquant.data.load_text`.
      against: the model to be near to, such as the one that the checkpoint was made from; None for none.
      length: tokens of a window.
      windows: how many.
      folder: where the files of a named data set lie; None to get it from the hub.
      on_progress: called after each block and window.

    Raises:
      DataError: the text cannot be had or is too short, or the models have different vocabularies.
      CheckpointError: a model cannot be read.
      ConversionError: the same, for a foreign one.
    """
    text = load_text(dataset, "evaluation", folder=folder)
    tokens = token_windows(text, load_tokenizer(source), length=length, count=windows)

    def tell(stage: str) -> Callable[[int, int], None]:
        return lambda done, total: on_progress(Progress(stage, done, total))

    on_progress(Progress("reading the model"))
    model, reference = open_model(source), None if against is None else open_model(against)
    taps = tap_statistics(model, tokens, on_block=tell("taps"))
    about = windows, length, dataset, dict(text.provenance)
    if reference is None:
        return Analysis(taps, (), None, None, *about)
    reference_taps = tap_statistics(reference, tokens, on_block=tell("taps of the reference"))
    distances = None
    if share_basis(reference, model):
        distances = block_distances(reference, model, tokens, on_block=tell("distances"))
    apart = divergence(stack_if_alike(reference), stack_if_alike(model), tokens, on_window=tell("divergence"))
    return Analysis(taps, reference_taps, distances, apart, *about)


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
      target: whose kernels multiply: see `jquant.machines.choose_target`.
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
