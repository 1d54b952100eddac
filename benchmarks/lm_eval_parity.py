r"""lm-eval's tasks on one model by our adapter and by lm-eval's own Hugging Face model under torch: the same answers?

Both get the same requests, made by lm-eval from local files, in float32. Theirs go one by one: in a batch its texts run
on behind the end of text until all rows have ended, and special tokens are then left out, so that nothing cuts them.
Prints one JSON line a task: the largest and the mean difference of log-likelihoods and how many agree on what greedy
decoding gives, or how many texts are equal. The other side runs in an interpreter of its own, which has torch,
transformers, accelerate and lm-eval.

    python benchmarks/lm_eval_parity.py FOLDER --data DIR --reference PYTHON [--tasks boolq ...] [--limit 50]

FOLDER is a Hugging Face folder, DIR has the files that eval/task_data.py names.
"""

import argparse
import importlib.metadata
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Final

TASKS: Final = ("boolq", "arc_easy", "hellaswag", "piqa", "winogrande")
TOKENS: Final = 2048  # of a batch


def answer_by_ours(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns all requests of the tasks, each with our answer."""
    import jax

    from convert import load_tokenizer
    from eval.harness import HarnessModel
    from eval.task_data import TaskFolder
    from eval.tasks import TaskOptions, load_tasks
    from jquant.folders import open_for_use

    jax.config.update("jax_default_matmul_precision", "highest")
    folder = TaskFolder(arguments.data)
    tasks = load_tasks(arguments.tasks, folder, TaskOptions(arguments.data))["tasks"]
    model = HarnessModel(open_for_use(arguments.folder), load_tokenizer(arguments.folder), batch_tokens=TOKENS)
    rows = []
    for name, task in tasks.items():
        task.build_all_requests(limit=arguments.limit)
        kind = task.instances[0].request_type
        answers = getattr(model, kind)(task.instances)
        rows += [
            {"task": name, "kind": kind, "arguments": request.args, "answer": answer}
            for request, answer in zip(task.instances, answers, strict=True)
        ]
    return rows


def answer_by_theirs(folder: Path, rows: list[dict[str, Any]]) -> list[Any]:
    """Returns the answers of lm-eval's own model; run in the other interpreter."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1)
    answers: list[Any] = [None] * len(rows)
    for kind in {row["kind"] for row in rows}:
        places = [place for place, row in enumerate(rows) if row["kind"] == kind]
        asked = [Instance(kind, {}, tuple(rows[place]["arguments"]), 0) for place in places]
        for place, answer in zip(places, getattr(model, kind)(asked)):
            answers[place] = answer
    return answers


def compare(rows: list[dict[str, Any]], theirs: list[Any]) -> None:
    """Prints how the answers differ, task by task."""
    for task in dict.fromkeys(row["task"] for row in rows):
        pairs = [(row["answer"], other) for row, other in zip(rows, theirs, strict=True) if row["task"] == task]
        line: dict[str, Any] = {"task": task, "requests": len(pairs)}
        if isinstance(pairs[0][0], str):
            line["equal_texts"] = sum(ours == other for ours, other in pairs)
        else:
            differences = [abs(ours[0] - other[0]) for ours, other in pairs]
            line |= {"largest_difference": max(differences), "mean_difference": sum(differences) / len(pairs)}
            line["lowest_log_likelihood"] = min(ours[0] for ours, _ in pairs)
            line["equal_greedy"] = sum(ours[1] == other[1] for ours, other in pairs)
        print(json.dumps(line), flush=True)


def main() -> None:
    """Runs both sides and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--reference", help="the interpreter that has torch")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--answer", type=Path, help="used by the script itself: a file of requests, for answers")
    arguments = parser.parse_args()
    if arguments.answer is not None:
        rows = json.loads(arguments.answer.read_text("utf-8"))
        arguments.answer.write_text(json.dumps(answer_by_theirs(arguments.folder, rows)), "utf-8")
        return
    started = time.monotonic()
    rows = answer_by_ours(arguments)
    asked = {"model": arguments.folder.name, "tasks": arguments.tasks, "limit": arguments.limit}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "lm-eval")}
    print(json.dumps({**asked, **versions, "seconds_ours": time.monotonic() - started}), flush=True)
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "requests.json"
        file.write_text(json.dumps(rows), "utf-8")
        command = [arguments.reference, __file__, str(arguments.folder), "--answer", str(file)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        compare(rows, json.loads(file.read_text("utf-8")))


if __name__ == "__main__":
    main()
