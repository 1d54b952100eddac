"""Peak memory of quantizing a checkpoint block by block, by the operating system, beside what `plan` predicts.

    python -m benchmarks.quantize_memory FOLDER [--shape llama-3.1-8b] [--recipe rtn-w4g128] [--set CHANGE ...]

Writes a random bfloat16 checkpoint of a known model's shape into FOLDER (16.06 GB for Llama-3.1-8B) with a tokenizer of
single characters, unless it is there, and quantizes it in a process of its own. The peak is that child's ru_maxrss as
wait4 returns it. A small process starts the child, as ru_maxrss begins at the parent's. One line of JSON.
"""

import argparse
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

KEPT: Final = "source"


def write_source(folder: Path, shape: str, layers: int) -> int:
    """Write the checkpoint; return the bytes of its arrays."""
    import dataclasses

    from jquant.folders import open_abstract
    from jquant.formats import tree_nbytes
    from jquant.models import SHAPES

    settings = SHAPES[shape]
    settings = dataclasses.replace(settings, num_hidden_layers=layers or settings.num_hidden_layers)
    if not folder.exists():
        importlib.import_module("benchmarks.export_memory").write_dense(folder.with_name("unfinished"), settings)
        importlib.import_module("tests.checkpoints").write_tokenizer(folder.with_name("unfinished"))
        folder.with_name("unfinished").rename(folder)
    return tree_nbytes(open_abstract(folder))


def quantize(source: Path, out: Path, recipe: str, changes: list[str]) -> dict[str, Any]:
    """Quantize in blocks; return what the report says of memory and time."""
    from jquant.pipeline import quantize as run
    from jquant.recipe import load_recipe

    report = run(source, out, load_recipe(recipe, changes), memory="blocks", on_progress=lambda one: note(one.stage))
    details = dict(report.details)
    seconds = [block.seconds for block in report.blocks]
    return {"memory": details["memory"], "bytes": details["bytes"], "block_seconds": round(sum(seconds), 1)}


def note(text: str) -> None:
    """Print a line of progress on stderr."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{time.strftime('%H:%M:%S')} {text}, peak {peak / 2**20:.2f} GiB", file=sys.stderr, flush=True)


def in_child(arguments: list[str]) -> tuple[dict[str, Any], int]:
    """Run this module in a child; return what it prints and its ru_maxrss in bytes."""
    command = [sys.executable, "-m", "benchmarks.quantize_memory", *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert child.stdout is not None
    printed = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"the child ended with status {status}")
    return json.loads(printed), usage.ru_maxrss * 2**10


def main() -> None:
    """Write the source, then quantize it, each in a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--recipe", default="rtn-w4g128")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--step", choices=["write", "quantize"])
    given = parser.parse_args()
    source, out = given.folder / KEPT, given.folder / "quantized"
    if given.step == "write":
        print(json.dumps({"bytes": write_source(source, given.shape, given.layers)}))
        return
    if given.step == "quantize":
        print(json.dumps(quantize(source, out, given.recipe, given.set)))
        return
    given.folder.mkdir(exist_ok=True)
    written, _ = in_child(["--step", "write", *sys.argv[1:]])
    shutil.rmtree(out, ignore_errors=True)
    started = time.monotonic()
    found, peak = in_child(["--step", "quantize", *sys.argv[1:]])
    row = {"shape": given.shape, "recipe": given.recipe, "set": given.set, "source_gb": written["bytes"] / 1e9}
    row |= {"result_gb": found["bytes"] / 1e9, "seconds": round(time.monotonic() - started), "peak_gb": peak / 1e9}
    print(json.dumps(row | {key: found[key] for key in ("memory", "block_seconds")}))


if __name__ == "__main__":
    main()
