"""`jquant eval`."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from eval import TaskOptions, check_tasks
from eval.batches import BATCH_TOKENS
from jquant.commands.devices import ONE_DEVICE, Devices, is_first
from jquant.commands.display import show_progress, split_names, stdout
from jquant.data import PYTHON_DOCS
from jquant.errors import RecipeError
from jquant.folders import make_writable, open_abstract, open_for_use, write_text
from jquant.inspection import inspect_model
from jquant.machines import TargetName
from jquant.measure import measure, measure_tasks
from jquant.pages import evaluation_page
from jquant.tables import measurement_table, tasks_table


def run(
    model: str,
    /,
    *,
    perplexity: str | None = None,
    windows: int | None = None,
    length: int = 2048,
    tasks: Annotated[Sequence[str], Parameter(negative="", consume_multiple=True)] = (),
    limit: int | None = None,
    shots: int | None = None,
    chat_template: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    cache: Path | None = None,
    data: Path | None = None,
    target: TargetName = "auto",
    json_: Annotated[Path | None, Parameter(name="--json")] = None,
    report: Path | None = None,
    devices: Devices = ONE_DEVICE,
) -> None:
    """Measure a model: its perplexity, exp of the mean over windows of each window's mean loss, and tasks of lm-eval.

    Args:
      model: a jquant checkpoint, a Hugging Face folder, a GGUF file or a hub id.
      perplexity: the text: python-docs, wikitext2, c4, or a file; its evaluation split is used. If neither it nor tasks
        are given, python-docs.
      windows: how many windows; all of the text if not given.
      length: tokens in a window.
      tasks: names in lm-eval, such as boolq,arc_easy or mmlu; needs jquant[tasks].
      limit: documents of each task, the first ones; all if not given.
      shots: examples in each prompt; each task's own number if not given.
      chat_template: whether prompts of tasks go through the model's chat template, examples as turns.
      batch_tokens: tokens of tasks that go through the model at once, to bound memory.
      cache: a folder for answers to tasks, so that the same command goes on where it was stopped.
      data: the folder where the files of named texts and of tasks lie, or its text/ and tasks/, instead of the hub.
      target: whose kernels multiply; auto is the GPU's own for models in bfloat16 on an H100 or H200. With +tokamax,
        prompts attend by tokamax (jquant[tokamax]), not by cuDNN.
      json_: a file to write the result to, all figures of tasks included.
      report: an HTML file to write: the figures, the loss of each window, where the data came from.
      devices: which devices.
    """
    mesh = devices.start()
    names = split_names(tasks)
    if not names and (limit, shots, chat_template, cache) != (None, None, False, None):
        raise RecipeError("--limit, --shots, --chat-template and --cache belong to tasks: name some with --tasks")
    options = TaskOptions(data, limit, shots, "template" if chat_template else "none", batch_tokens)
    if names:
        check_tasks(names, options)
    text = PYTHON_DOCS if perplexity is None and not names else perplexity
    for folder in (cache, *(file.parent for file in (json_, report) if file is not None)):
        if folder is not None:
            make_writable(folder)
    facts = inspect_model(open_abstract(model))
    result: dict[str, Any] = {"model": model, "bits_per_weight": facts.bits_per_weight()}
    if mesh is not None and cache is not None:
        raise RecipeError("--cache belongs to one device: answers are kept by a digest of the whole model")
    ready = open_for_use(model, target=target, mesh=mesh) if mesh is not None or (text and names) else None
    with show_progress() as on_progress:
        shared: dict[str, Any] = {"model": ready, "target": target, "on_progress": on_progress}
        if text is not None:
            measured = measure(model, text, length=length, windows=windows, folder=data, **shared)
            result |= dataclasses.asdict(measured)
        if names:
            done = measure_tasks(model, names, options, cache=cache, **shared)
            result["tasks"] = dataclasses.asdict(done)
    if not is_first():
        return
    if text is not None:
        stdout().print(measurement_table({model: (measured, facts)}))
    if names:
        stdout().print(tasks_table(done, model))
    if report is not None:
        write_text(report, evaluation_page(model, facts, None if text is None else measured, done if names else None))
    if json_ is not None:
        write_text(json_, json.dumps(result, indent=1, default=str))
