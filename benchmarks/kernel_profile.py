"""Why a kernel takes its time: bytes moved, issue slots, occupancy and stalls by Nsight Compute, as JSON lines.

    python -m benchmarks.kernel_profile --seconds 180 --output profile.jsonl
    python -m benchmarks.kernel_profile --cases w4a16-8192x8192 spqr3-8192x8192
    python -m benchmarks.kernel_profile --lower                    all cases lowered to CUDA, where there is no GPU

Each case is a process of its own under `ncu`; all compile side by side and take turns on the GPU.
`ncu` counts exactly one call, compiled, warmed up, its operands there, and before it a copy of 512 MiB for the share.
It repeats each kernel for groups of counters, caches flushed before each time, as weights lie beyond the second cache;
clocks are left alone. So microseconds are one run's, and bytes that a kernel leaves in the second cache count as
unwritten. Stalls are the three largest shares of the cycles between two instructions of a warp, "selected" being the
issue itself. "share_of_copy" is what a kernel read and wrote a second beside the copy's; "of_copy" likewise what the
call cannot do without: codes and grids, a cache, or the tensors it turns. What this `ncu` does not know, or gave no
number for, a row names under "not_measured"; where `ncu` did not end well, its rows say so by a "status".
"""

import argparse
import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp

from benchmarks.nsight import COPIED, EVERY, beside_copy, kernels, known
from pallas_kernels import grid
from pallas_kernels.attention_bench import LLAMA, SEED
from pallas_kernels.attention_case import AttentionCase
from pallas_kernels.cases import Case
from pallas_kernels.kivi_case import KiviCase
from pallas_kernels.measure import WITHOUT_AUTOTUNING
from pallas_kernels.narrow_case import NarrowCase
from pallas_kernels.rotation_case import RotationCase

CASES: Final[dict[str, Any]] = {
    "w4a16-8192x8192": Case("w4a16", 1, 8192, 8192, 64),
    "w4a16-8192x8192-16": Case("w4a16", 16, 8192, 8192, 64),
    "spqr3-8192x8192": NarrowCase("spqr3", 1, 8192, 8192, 512),
    "w4a16-4096x4096": Case("w4a16", 1, 4096, 4096, 32),
    "w4a16-4096x14336": Case("w4a16", 1, 4096, 14336, 112),
    "w4a16-28672x4096-16": Case("w4a16", 16, 28672, 4096, 32),
    "binary3-7168x28672": NarrowCase("binary3", 1, 7168, 28672, 224),
    "kv4-1x32768": AttentionCase("kv4", 1, *LLAMA, 32768),
    "kivi2-16x32768-g32": KiviCase(2, 16, *LLAMA, 32768),
    "kivi2-16x32768-g128": KiviCase(2, 16, *LLAMA, 32768, group=128),
    "rotation-2048x8192": RotationCase(2048, 8192, 1),
}
ENVIRONMENT: Final = {  # ncu saves all memory that a kernel can reach: JAX is to hold no pool of it
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer=",  # kernels apart, no graphs
}
MODULE: Final = ("-m", "benchmarks.kernel_profile")  # for `python`, in the repository's folder
GRACE: Final = 30.0  # seconds after the end, when a process is killed


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=180.0, help="profile nothing new after so long")
    parser.add_argument("--at-once", type=int, default=os.cpu_count(), help="processes under ncu")
    parser.add_argument("--ncu", default="ncu", help="the program")
    parser.add_argument("--output", type=Path, help="a file to add JSON lines to; what ncu wrote goes into FILE.csv")
    parser.add_argument("--lower", action="store_true", help="lower to CUDA alone, where there is no GPU")
    parser.add_argument("--child", nargs=3, metavar=("CASE", "TURNS", "UNTIL"), help="what runs under ncu")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)  # before JAX looks for devices
    if arguments.child:
        name, turns, until = arguments.child
        _call_once(CASES[name], Path(turns), float(until))
        return
    lines = _lowered(arguments) if arguments.lower else _profiles(arguments, time.monotonic() + arguments.seconds)
    for line in map(json.dumps, lines):
        print(line, flush=True)
        if arguments.output is not None:
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _head(name: str) -> dict[str, Any]:
    """Returns what all rows of a case begin with; a rotation has no configuration."""
    case = CASES[name]
    config = None if isinstance(case, RotationCase) else dataclasses.asdict(case.config())
    return {"case": name, "config": config}


def _profiles(arguments: argparse.Namespace, end: float) -> Iterator[dict[str, Any]]:
    """Yields what runs, and the rows of all cases as they come."""
    metrics, failed = known(arguments.ncu)
    unknown = [name for name in EVERY if name not in metrics]
    command = " ".join(["python", *MODULE, *sys.argv[1:]])
    yield {"command": command, "jax": jax.__version__, "unknown_metrics": unknown, "query_failed": failed}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.at_once) as pool:
        running = {
            pool.submit(_under_ncu, arguments.ncu, metrics, [name, f"{folder}/turns", str(end)]): name
            for name in arguments.cases
        }
        for future in as_completed(running):
            name = running[future]
            text, printed, status = future.result()
            head = _head(name) | ({"status": status} if status else {})
            if arguments.output is not None:
                with arguments.output.with_suffix(".csv").open("a", encoding="utf-8") as file:
                    file.write(f"{json.dumps(head)}\n{text}\n")
            profiled = kernels(text, metrics)
            if len(profiled) < 2 or any(row["microseconds"] is None for row in profiled):
                yield head | {"failure": text[-600:], "printed": printed[-600:]}
                continue
            yield from (head | row for row in beside_copy(profiled, _bytes(CASES[name])))


def _under_ncu(ncu: str, metrics: Sequence[str], child: list[str]) -> tuple[str, str, int]:
    """Returns what ncu wrote of one case's call, what the program under it printed, and the exit status."""
    log = Path(f"{child[1]}-{child[0]}")
    command = [ncu, "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
    command += ["--profile-from-start", "off", "--target-processes", "application-only", "--clock-control", "none"]
    command += ["--cache-control", "all", "--metrics", ",".join(metrics), sys.executable, *MODULE, "--child", *child]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        printed, _ = process.communicate(timeout=max(1.0, float(child[2]) + GRACE - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed = f"killed {GRACE:.0f} s after the end: {process.communicate()[0]}"
    return log.read_text(encoding="utf-8") if log.exists() else "", printed, process.returncode


def _call_once(case: Any, turns: Path, until: float) -> None:
    """Calls a copy and the kernel once each under the profiler, all else outside it."""
    call, make = _traced(case).lower().compile(), _operands(case)
    numbers = jax.ShapeDtypeStruct((COPIED,), jnp.bfloat16)
    copy = jax.jit(lambda x: x + jnp.bfloat16(1)).lower(numbers).compile(WITHOUT_AUTOTUNING)
    with grid.turn(turns):
        if time.monotonic() > until:
            raise SystemExit("out of time: not profiled")
        for each, given in ((copy, lambda: (jnp.zeros(COPIED, jnp.bfloat16),)), (call, make)):
            operands = jax.block_until_ready(given())
            jax.block_until_ready(each(*operands))
            with _counted():
                jax.block_until_ready(each(*operands))
            del operands


@contextlib.contextmanager
def _counted() -> Iterator[None]:
    """Lets the profiler count kernels meanwhile, in JAX's context, which is the device's primary one."""
    driver, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    results = [driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0), driver.cuCtxSetCurrent(context)]
    results.append(driver.cuProfilerStart())
    try:
        yield
    finally:
        results.append(driver.cuProfilerStop())
        if any(results):
            raise RuntimeError(f"retain, set current, start, stop of the profiler returned {results}, expected zeros")


def _arguments(case: Any, seed: Any) -> tuple[Any, ...]:
    given = case.operands(seed)
    if isinstance(case, Case | NarrowCase):
        return given.x, given.steps, given.shift, case.prepare(given)
    return tuple(given)


def _operands(case: Any) -> Callable[[], tuple[Any, ...]]:
    """Returns what makes the operands, compiled; a rotation's are the host's."""
    if isinstance(case, RotationCase):
        return lambda: case.operands(0)
    make = jax.jit(lambda seed: _arguments(case, seed)).lower(SEED).compile(WITHOUT_AUTOTUNING)
    return lambda: make(jnp.int32(0))


def _traced(case: Any) -> Any:
    if isinstance(case, RotationCase):
        return jax.jit(case.kernel()).trace(*jax.eval_shape(lambda: case.operands(0)))
    return jax.jit(case.kernel(case.config())).trace(*jax.eval_shape(lambda: _arguments(case, 0)))


def _bytes(case: Any) -> float:
    """Returns the bytes that a call cannot do without."""
    if isinstance(case, RotationCase):
        return case.bytes_moved
    return case.bytes_of_codes if isinstance(case, Case | NarrowCase) else case.bytes_of_cache


def _lowered(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields whether each case lowers to a kernel for CUDA, and the seconds it takes."""
    for name in arguments.cases:
        start = time.monotonic()
        text = _traced(CASES[name]).lower(lowering_platforms=("cuda",)).as_text()
        yield _head(name) | {"lowered": "mosaic_gpu" in text, "seconds": round(time.monotonic() - start, 1)}


if __name__ == "__main__":
    main()
