"""Tasks such as BoolQ, MMLU or GSM8K, run by lm-eval on our models: its prompts, few-shot rules, filters and metrics.

Needs `jquant[tasks]`, which brings lm-eval and no torch. With a folder of local files rows come from there
(`eval.task_data`); without one lm-eval gets them from the Hugging Face hub.
"""

import contextlib
import difflib
import importlib.metadata
import importlib.util
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from eval.batches import BATCH_TOKENS
from eval.perplexity import kv_prompt
from eval.task_data import TASK_FOLDERS, LocalData, TaskFolder, local_data
from jquant.errors import DataError, JquantError
from jquant.models import Llama

_HARNESS: Final = "lm_eval"
_SEED: Final = 0  # lm-eval's own for Python's generator
_EXAMPLES_SEED: Final = 1234  # lm-eval's own for the choice of examples
_SAMPLES: Final = 100_000  # of a bootstrap, where a metric's error has no closed form: lm-eval's own
# The figure that publications quote, where it is not a task's first: spec_acts_kv.md 10.5.
_QUOTED: Final[Mapping[str, str]] = {"truthfulqa_gen": "bleu_acc"}


@dataclass(frozen=True)
class TaskOptions:
    """Say how tasks are run.

    Attributes:
      folder: where the files of tasks lie, itself or its folder `tasks`; None to get them from the hub.
      limit: documents of each task, the first ones; None for all.
      shots: examples in each prompt; None for a task's own number. A task that fixes 0 keeps it.
      chat: "template" to put prompts through the model's chat template, examples as turns; "none" to leave them.
      batch_tokens: tokens, padding counted, that go through the model at once.
    """

    folder: Path | None = None
    limit: int | None = None
    shots: int | None = None
    chat: Literal["none", "template"] = "none"
    batch_tokens: int = BATCH_TOKENS


@dataclass(frozen=True)
class TaskScore:
    """Hold one figure of a task or of a group of tasks.

    Attributes:
      task: its name.
      metric: such as "acc".
      filter: what was extracted from texts first, "none" where nothing was.
      value: the figure.
      error: its standard error, None where it has none.
      documents: how many it is the mean of.
      shots: examples in each prompt; None for a group whose members differ.
      quoted: whether it is the one that publications quote.
      part: whether it is a member of a group that was asked for.
    """

    task: str
    metric: str
    filter: str
    value: float
    error: float | None
    documents: int
    shots: int | None
    quoted: bool
    part: bool


@dataclass(frozen=True)
class TaskResults:
    """Hold what tasks gave.

    Attributes:
      scores: task by task, in the order asked for; a group before its members.
      truncated: requests whose prompt lost its left end, as it exceeded the model's context.
      kv_prompt: what prompts saw of keys and values, as `Perplexity.kv_prompt`.
      provenance: versions, files and how they differ from the hub's.
    """

    scores: tuple[TaskScore, ...]
    truncated: int
    kv_prompt: str
    provenance: dict[str, str]


def check_tasks(names: Sequence[str], options: TaskOptions) -> None:
    """Raises before any work where tasks cannot be run.

    Raises:
      DataError: lm-eval is not installed, a task is unknown, or its rows cannot be had or are malformed.
    """
    _check(names, options)
    with _as_lm_eval_wants():
        load_tasks(names, None if options.folder is None else TaskFolder(options.folder), options)


def run_tasks(
    model: Llama,
    tokenizer: Any,
    names: Sequence[str],
    options: TaskOptions,
    *,
    cache: Path | None = None,
    on_request: Callable[[int, int], None] = lambda done, total: None,
) -> TaskResults:
    """Run tasks by their names in lm-eval.

    Args:
      model: the model.
      tokenizer: its own.
      names: tasks, groups or tags, such as "boolq" or "mmlu".
      options: how they are run.
      cache: a file for answers, which belong to this model alone: a run that was stopped goes on after the last of
        them. None to keep nothing.
      on_request: called with the requests answered and those of the present kind.

    Raises:
      DataError: lm-eval is not installed, a task is unknown, its rows cannot be had or are malformed, or there is no
        chat template.
    """
    _check(names, options)
    from lm_eval.evaluator import evaluate

    from eval.harness import HarnessModel

    folder = None if options.folder is None else TaskFolder(options.folder)
    adapter = HarnessModel(model, tokenizer, batch_tokens=options.batch_tokens, on_request=on_request)
    with _as_lm_eval_wants():
        loaded = load_tasks(names, folder, options)
        with _caching(adapter, cache) as answering:
            found = evaluate(
                lm=answering,
                task_dict=loaded,
                limit=options.limit,
                bootstrap_iters=_SAMPLES,
                log_samples=False,
                apply_chat_template=options.chat == "template",
                fewshot_as_multiturn=options.chat == "template",
            )
    return TaskResults(_scores(found, names), adapter.truncated, kv_prompt(model), _provenance(folder))


def _check(names: Sequence[str], options: TaskOptions) -> None:
    if importlib.util.find_spec(_HARNESS) is None:
        raise DataError("tasks need lm-eval, which is not installed: pip install 'jquant[tasks]'")
    if not names or (options.limit is not None and options.limit < 1) or (options.shots or 0) < 0:
        raise DataError(
            f"{len(names)} tasks, limit {options.limit}, {options.shots} examples: give a task at least, a limit of at "
            "least 1 or none, and no negative number of examples"
        )


def load_tasks(names: Sequence[str], folder: TaskFolder | None, options: TaskOptions) -> Any:
    """Return lm-eval's tasks, their rows read, their examples chosen as its own evaluation chooses them.

    Args:
      names: tasks, groups or tags.
      folder: where rows come from; None for the hub.
      options: of which the number of examples matters here.

    Returns:
      What `lm_eval.evaluator.evaluate` takes as `task_dict`.

    Raises:
      DataError: a task is unknown, or its rows cannot be had or are malformed.
    """
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    places = [Path(lm_eval.tasks.__file__).parent / name for name in TASK_FOLDERS]
    manager = TaskManager() if folder is None else TaskManager(include_defaults=False, include_path=places)
    for name in names:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            where = "lm-eval" if folder is None else f"what runs from local files ({', '.join(TASK_FOLDERS)})"
            hint = f"did you mean {' or '.join(close)}?" if close else "see lm-eval's list of tasks"
            raise DataError(f"{name!r} is no task of {where}; {hint}")
    if folder is not None:
        _redirect(manager.task_index, names, folder, options.shots)
    try:
        loaded = manager.load(list(names))
    except JquantError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(
            f"the rows of {', '.join(names)} could not be loaded: {error}. Offline, give the folder with their files"
        ) from error
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        task.set_config(key="num_fewshot", value=_shots(own, options.shots))
        task.set_fewshot_seed(seed=_EXAMPLES_SEED)
    return loaded


def _shots(own: int | None, wanted: int | None) -> int:
    """Return the examples of a prompt by lm-eval's rule: what is asked for, unless the task itself says 0."""
    if wanted is None or own == 0:
        return own or 0
    return wanted


def _redirect(index: dict[str, Any], names: Sequence[str], folder: TaskFolder, shots: int | None) -> None:
    """Change the entries of an index that some names lead to, so that the tasks' rows come from files."""
    from lm_eval.tasks._yaml_loader import load_yaml  # what the manager itself reads a task's file by

    for name in _leaves(index, names):
        entry = index[name]
        settings = load_yaml(entry.yaml_path, resolve_func=True)
        configuration = settings.get("dataset_name") or ""
        data = local_data(settings.get("dataset_path"), configuration)
        if data is None:
            raise DataError(f"{name} of lm-eval {importlib.metadata.version(_HARNESS)} is on a data set not known here")
        entry.yaml_path, entry.cfg = None, settings | _from_files(settings, data, configuration, folder, shots)


def _leaves(index: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """Return the tasks that names of tasks, groups and tags lead to."""
    found: set[str] = set()
    for name in names:
        entry = index[name]
        if entry.kind.name == "TASK":
            found.add(name)
        else:
            inside = entry.tags if entry.kind.name == "TAG" else entry.cfg["task"]
            found |= _leaves(index, (one if isinstance(one, str) else one.get("group", one["task"]) for one in inside))
    return found


def _from_files(
    settings: Mapping[str, Any], data: LocalData, name: str, folder: TaskFolder, shots: int | None
) -> dict[str, Any]:
    """Return what changes in a task's settings so that its rows come from files."""
    lacking = settings.get("training_split") not in (None, *folder.present(data, name))
    samples = settings.get("fewshot_split") or (settings.get("fewshot_config") or {}).get("samples")
    examples = _shots(settings.get("num_fewshot"), shots)

    def read(**_: Any) -> dict[str, Any]:  # lm-eval copies settings deeply, functions excepted
        from datasets import Dataset

        if lacking and samples is None and examples:
            raise DataError(
                f"{settings['task']}: its {examples} examples come from a train split, which is not in {folder.place}: "
                "ask for 0 shots"
            )
        return _Splits({split: Dataset.from_list(rows) for split, rows in folder.splits(data, name).items()})

    changes: dict[str, Any] = {"custom_dataset": read, "dataset_kwargs": None}
    return changes | ({"training_split": None} if lacking else {})


class _Splits(dict[str, Any]):
    """Hold the splits of a data set, and say what is absent when a task asks for one that is not there."""

    def __missing__(self, split: str) -> Any:
        raise DataError(
            f"a task needs the split {split!r} of its data, but there are files for {', '.join(self)} alone"
        )


@contextlib.contextmanager
def _as_lm_eval_wants() -> Iterator[None]:
    """Seed Python's generator, which some tasks draw from, and give it back as it was; let lm-eval say errors alone."""
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    logger, own = logging.getLogger(_HARNESS), random.getstate()
    level = logger.level
    random.seed(_SEED)
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()
        logger.setLevel(level)
        random.setstate(own)


@contextlib.contextmanager
def _caching(adapter: Any, cache: Path | None) -> Iterator[Any]:
    """Yield the adapter, behind lm-eval's cache if there is to be one."""
    from lm_eval.api.model import CachingLM

    if cache is None:
        yield adapter
        return
    cached = CachingLM(adapter, str(cache))
    try:
        yield cached
    finally:
        cached.dbdict.close()


def _scores(found: Any, names: Sequence[str]) -> tuple[TaskScore, ...]:
    """Return lm-eval's results row by row: what was asked for in its order, members behind their group."""
    members: Mapping[str, Sequence[str]] = found["group_subtasks"]
    inside = {member for part in members.values() for member in part}
    results = {**found["results"], **found.get("groups", {})}
    places = {name: place for place, name in enumerate(names)}
    rows: list[TaskScore] = []

    def add(name: str) -> None:
        rows.extend(_rows(name, results[name], found, part=name in inside))
        for member in members.get(name, ()):
            add(member)

    for name in sorted(set(results) - inside, key=lambda name: (places.get(name, len(names)), name)):
        add(name)
    return tuple(rows)


def _rows(name: str, result: Mapping[str, Any], found: Any, *, part: bool) -> Iterator[TaskScore]:
    """Yield the figures of one task or group; lm-eval's keys are "metric,filter"."""
    keys = [key for key in result if "," in key and "_stderr," not in key]
    quoted = next((key for key in keys if key.split(",")[0] == _QUOTED.get(name)), keys[0])
    for key in keys:
        metric, chosen = key.split(",", 1)
        error = result.get(f"{metric}_stderr,{chosen}")
        yield TaskScore(
            task=name,
            metric=metric,
            filter=chosen,
            value=float(result[key]),
            error=float(error) if isinstance(error, int | float) else None,
            documents=int(result["sample_len"]),
            shots=found["n-shot"].get(name),
            quoted=key == quoted,
            part=part,
        )


def _provenance(folder: TaskFolder | None) -> dict[str, str]:
    """Return what the rows were, and whose prompts and metrics were used."""
    harness = f"lm-eval {importlib.metadata.version(_HARNESS)}"
    if folder is None:
        return {"harness": harness, "source": "Hugging Face hub"}
    digests = {f"sha256 of {file}": digest for file, digest in folder.digests.items()}
    notes = folder.notes()
    return {"harness": harness, "source": str(folder.place), **digests} | ({"note": "; ".join(notes)} if notes else {})
