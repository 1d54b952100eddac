"""One model by many recipes: each quantized, saved, loaded again and measured on the same windows and tasks; one table.

A row is kept as soon as it is measured, under a name that holds a digest of all that decides it: model, recipe,
calibration windows, evaluation, versions and device. The same call goes on after the last of them, within a recipe
after its last block, its perplexity or the last answer to a task; other recipes or another evaluation add rows.
Several processes that are given the same call share its rows out among them. Products are float32 throughout, so that
rows differ by method and not by device; but for those that a target's kernels make when results are measured.

By default each Hessian is the one of its own run: a block's inputs come from the quantized blocks before it, so no two
recipes have the same. With `share_hessians` every method solves on the inputs that the source model gives, whose
Hessians are computed once for each site and kept on disk until the table is finished: faster, and the solves
alone are compared. Published figures are those of the default.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import jax

from convert import load_tokenizer
from convert.huggingface import StoredDtype
from eval import TaskOptions, check_tasks
from eval.perplexity import kv_prompt
from jquant.blocks import BlockPass, QuantizeWeights
from jquant.checkpoint import digest as model_digest
from jquant.checkpoint import is_checkpoint, recorded_digest
from jquant.comparison import VERSIONS, Provenance, Row, block_errors, claim, read_row, write_row, write_tables
from jquant.data import PYTHON_DOCS
from jquant.errors import CheckpointError, DataError, JquantError, RecipeError
from jquant.folders import open_abstract, open_for_use, open_model, read_report, remove_folder, write_text
from jquant.inspection import inspect_model
from jquant.machines import TargetName, choose_target
from jquant.measure import ModelFigures, measure, measure_tasks
from jquant.passes import Sequential
from jquant.pipeline import WINDOWS, calibration_tokens, quantize, store_of
from jquant.plan import plan
from jquant.progress import OnProgress, Progress, ignore
from jquant.recipe import Calibration, Recipe, digest, to_yaml
from jquant.targets import describe_products

BASELINE: Final = "full precision"
PAPER_TABLES: Final = "paper-tables"  # stands for the presets of QLLM-INFER's tables (spec_acts_kv.md 12.1), as far as
_PAPER_PRESETS: Final = (  # they are here: its activations and weights, KV caches, QRazor, LUT-GEMM, SpQR
    "rtn-w8a8",
    "smoothquant-w8a8",
    "rtn-w6a6",
    "smoothquant-w6a6",
    "llm-int8",
    "zeroquant-w8a8",
    "zeroquant-w4a16",
    "zeroquant-w4a16-lkd",
    "zeroquant-w4a8",
    "zeroquant-w4a8-lkd",
    "zeroquant-w4a4",
    "gptq-w4",
    "rtn-w4g128",
    "gptq-w4g128",
    "lut-w4g128",
    "spqr-w3",
    "spqr-w2",
    "kivi-4",
    "kivi-2",
    "kvquant-4",
    "kvquant-3",
    "kvquant-2",
    "qrazor-w4g8",
    "qrazor-w4g32",
    "gptq-qrazor-w4g8",
    "qrazor-w4a8",
    "qrazor-w4a4",
    "qrazor-w4kv4-g8",
)
_ROWS: Final = "rows"
_WORK: Final = "work"
_STATISTICS: Final = "statistics"
_KEY_LENGTH: Final = 12  # hexadecimal digits of a digest in a file's name
_HARNESS: Final = "lm-eval"


@dataclass(frozen=True)
class Evaluation:
    """What every row is measured on.

    Attributes:
      datasets: names or paths for `jquant.data.load_text`, at least one; their evaluation splits are used.
      windows: how many windows of each; None for all of the text.
      length: tokens of a window.
      target: whose kernels multiply: see `jquant.machines.choose_target`.
      tasks: names in lm-eval, none to run none.
      limit: documents of each task, the first ones; None for all.
      shots: examples in each prompt; None for each task's own number.
    """

    datasets: tuple[str, ...] = (PYTHON_DOCS,)
    windows: int | None = None
    length: int = 2048
    target: TargetName = "reference"
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    shots: int | None = None

    def describe(self) -> str:
        """Returns the evaluation in words."""
        count = "all" if self.windows is None else self.windows
        names = " and ".join(self.datasets)
        text = f"perplexity of {count} windows of {self.length} tokens of {names}, evaluation split"
        if self.target != "reference":
            text = f"{text}, kernels of {self.target}"
        if not self.tasks:
            return text
        documents = "all documents" if self.limit is None else f"the first {self.limit} documents of each"
        examples = "" if self.shots is None else f", {self.shots} examples in each prompt"
        return f"{text}; tasks by lm-eval {importlib.metadata.version(_HARNESS)} on {documents}{examples}"


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
      evaluation: what perplexity is measured on, and the tasks that are run.
      folder: where the files of named data sets and tasks lie; None to get them from the hub.
      dtype: of a foreign checkpoint's arrays.
      share_hessians: whether all recipes solve on the source model's own activations (`on_source_inputs`).
      on_progress: called at each stage.

    Returns:
      The rows in the order of the recipes, full precision first; `table.md`, `table.csv` and `table.json` in `out` hold
      the same and are renewed after each row.

    Raises:
      RecipeError: two recipes have one name, one does not fit the model, or the target is not there; said before any
        work.
      DataError: tasks cannot be run (lm-eval is not installed, one is unknown, or its rows cannot be had), or the
        windows that a recipe calibrates on cannot; said before any work.
      JquantError: a quantization or a measurement failed; the recipe is named, finished rows are kept.
    """
    _check_names(recipes)
    if evaluation.tasks:
        check_tasks(evaluation.tasks, TaskOptions(folder, evaluation.limit, evaluation.shots))
    recipes = [on_source_inputs(one) for one in recipes] if share_hessians else recipes
    abstract = open_abstract(source, dtype=dtype)
    chosen = choose_target(evaluation.target, abstract.embed_tokens.dtype)
    evaluation = dataclasses.replace(evaluation, target=cast(TargetName, chosen.value))
    tokenizer = load_tokenizer(source)
    for one in recipes:
        with _named(one.name):
            plan(abstract, one)
            calibration_tokens(one, tokenizer, abstract.config, folder=folder)
    _make(out / _ROWS)
    _make(out / _WORK)
    on_progress(Progress("reading the model"))
    identity = recorded_digest(source) if is_checkpoint(source) else model_digest(open_model(source, dtype=dtype))
    jobs = [_job(out, one, _key(identity, one, evaluation, folder)) for one in (None, *recipes)]
    pending = list(enumerate(jobs, 1))
    for wait in (False, True):  # what other processes make at present is left to them, and waited for at the end
        for number, job in tuple(pending):
            with _named(job.name), jax.default_matmul_precision("highest"), claim(job.lock, wait=wait) as ours:
                if not ours:
                    continue
                if not job.file.exists():
                    on_progress(Progress(f"{job.name} ({number} of {len(jobs)})"))
                    write_row(job.file, _run(source, job, evaluation, folder, dtype, on_progress))
                for done in (job.checkpoint, store_of(job.checkpoint), _cells(job.checkpoint)):
                    remove_folder(done)  # also what a run left that was killed behind its row
            pending.remove((number, job))
            _write_tables(out, jobs, evaluation, source)
    if not list((out / _WORK).glob("*.lock")):  # of another comparison that is made here, and may use them
        remove_folder(out / _STATISTICS)
    return tuple(read_row(job.file).figures for job in jobs)


def expand(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of recipes, `paper-tables` replaced by the presets of QLLM-INFER's tables.

    Example:
      >>> expand(["kv4", "paper-tables"])[:3]
      ('kv4', 'rtn-w8a8', 'smoothquant-w8a8')
    """
    return tuple(one for name in names for one in (_PAPER_PRESETS if name == PAPER_TABLES else (name,)))


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


@dataclass(frozen=True)
class _Job:
    """A row to make: its recipe (None for full precision), its name, its file, its lock and its unfinished work."""

    recipe: Recipe | None
    name: str
    file: Path
    lock: Path
    checkpoint: Path


def _job(out: Path, recipe: Recipe | None, key: str) -> _Job:
    name = BASELINE if recipe is None else recipe.name
    stem = f"{_file_name(name)}-{key}"
    return _Job(recipe, name, out / _ROWS / f"{stem}.json", out / _WORK / f"{stem}.lock", out / _WORK / stem)


def _run(
    source: str | Path,
    job: _Job,
    evaluation: Evaluation,
    folder: Path | None,
    dtype: StoredDtype,
    on_progress: OnProgress,
) -> Row:
    """Makes one row: quantizes if there is a recipe and no result of it yet, and measures what was saved."""
    recipe, checkpoint = job.recipe, job.checkpoint
    where: str | Path = source if recipe is None else checkpoint
    if recipe is not None and not is_checkpoint(checkpoint):
        statistics = checkpoint.parent.parent / _STATISTICS
        quantize(source, checkpoint, recipe, folder=folder, dtype=dtype, statistics=statistics, on_progress=on_progress)
    cells = _cells(checkpoint)
    _make(cells)
    model = open_for_use(where, target=evaluation.target)
    texts = {}
    for number, dataset in enumerate(evaluation.datasets):
        kept = cells / f"perplexity-{number}.json"
        if not kept.exists():
            length, windows = evaluation.length, evaluation.windows
            measured = measure(
                where, dataset, length=length, windows=windows, folder=folder, model=model, on_progress=on_progress
            )
            write_text(kept, json.dumps({"value": measured.perplexity.value, "provenance": measured.provenance}))
        texts[dataset] = json.loads(kept.read_text("utf-8"))
    results = None
    if evaluation.tasks:
        options = TaskOptions(folder, evaluation.limit, evaluation.shots)
        results = measure_tasks(
            where, evaluation.tasks, options, cache=cells, model=model, on_progress=on_progress
        ).results
    facts = inspect_model(open_abstract(where))
    figures = ModelFigures(
        name=job.name,
        perplexities=tuple((dataset, float(text["value"])) for dataset, text in texts.items()),
        bits_per_weight=facts.bits_per_weight(),
        bits_per_kv_value=facts.cache.bits_per_value,
        nbytes=facts.nbytes,
        seconds=0.0 if recipe is None else _seconds(checkpoint),
        scores=() if results is None else results.scores,
    )
    report = {} if recipe is None else read_report(checkpoint)
    provenance = Provenance(
        recipe="" if recipe is None else to_yaml(recipe),
        calibration=report.get("details", {}).get("calibration text"),
        texts={dataset: text["provenance"] for dataset, text in texts.items()},
        tasks={} if results is None else results.provenance,
        truncated=0 if results is None else results.truncated,
        kv_prompt=kv_prompt(model),
        products=describe_products(model),
    )
    return Row(figures, provenance, block_errors(report))


def _cells(checkpoint: Path) -> Path:
    """Returns the folder for what is measured of a row that is not finished."""
    return checkpoint.with_name(f"{checkpoint.name}-cells")


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
        *([importlib.metadata.version(_HARNESS)] if evaluation.tasks else []),
        jax.devices()[0].device_kind,
        *map(importlib.metadata.version, VERSIONS),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:_KEY_LENGTH]


def _sha256(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{file} cannot be read as windows of tokens: {error}") from error


def _write_tables(out: Path, jobs: Sequence[_Job], evaluation: Evaluation, source: str | Path) -> None:
    caption = f"{source}: {evaluation.describe()}, on {jax.devices()[0].device_kind}."
    about = {"source": str(source), "evaluation": dataclasses.asdict(evaluation), "caption": caption}
    write_tables(out, [read_row(job.file) for job in jobs if job.file.exists()], about, caption)


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
