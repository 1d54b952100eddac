"""Why a kernel takes its time: bytes moved, issue slots, occupancy and stalls by Nsight Compute, as JSON lines.

    python benchmarks/kernel_profile.py --seconds 180 --output profile.jsonl
    python benchmarks/kernel_profile.py --cases w4a16-8192x8192 spqr3-8192x8192
    python benchmarks/kernel_profile.py --lower                    all cases lowered to CUDA, where there is no GPU

Each case is a process of its own under `ncu`; all compile side by side and take turns on the GPU.
`ncu` counts exactly one call, compiled, warmed up, its operands there, and before it a copy of 512 MiB for the share.
It repeats each kernel for groups of counters, caches flushed before each time, as weights lie beyond the second cache;
clocks are left alone. So microseconds are one run's, and bytes that a kernel leaves in the second cache count as
unwritten. Stalls are shares of the cycles between two instructions of a warp, "selected" being the issue itself. What
this `ncu` does not know, or gave no number for, a row names under "not_measured".
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
from pallas_kernels.attention_bench import LLAMA, SEED, UNTRIED
from pallas_kernels.attention_case import AttentionCase
from pallas_kernels.cases import Case
from pallas_kernels.kivi_case import KiviCase
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
        _call_once(CASES[name], _config(CASES[name]), Path(turns), float(until))
        return
    lines = _lowered(arguments) if arguments.lower else _profiles(arguments, time.monotonic() + arguments.seconds)
    for line in map(json.dumps, lines):
        print(line, flush=True)
        if arguments.output is not None:
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _config(case: Any) -> Any:
    """Returns the configuration in use, None for the rotation's."""
    return None if isinstance(case, RotationCase) else case.config()


def _profiles(arguments: argparse.Namespace, end: float) -> Iterator[dict[str, Any]]:
    """Yields what runs, and the rows of all configurations as they come."""
    metrics, failed = known(arguments.ncu)
    head = {"command": " ".join(["python", *sys.argv]), "jax": jax.__version__}
    yield head | {"unknown_metrics": [name for name in EVERY if name not in metrics], "query_failed": failed}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.at_once) as pool:
        running = {
            pool.submit(_under_ncu, arguments.ncu, metrics, [name, f"{folder}/turns", str(end)]): name
            for name in arguments.cases
        }
        for future in as_completed(running):
            name = running[future]
            config = _config(CASES[name])
            head = {"case": name, "config": None if config is None else dataclasses.asdict(config)}
            text, printed = future.result()
            if arguments.output is not None:
                with arguments.output.with_suffix(".csv").open("a", encoding="utf-8") as file:
                    file.write(f"{json.dumps(head)}\n{text}\n")
            profiled = kernels(text, metrics)
            if len(profiled) < 2 or any(row["microseconds"] is None for row in profiled):
                yield head | {"failure": text[-600:], "printed": printed[-600:]}
                continue
            yield from (head | row for row in beside_copy(profiled, _bytes(CASES[name])))


def _under_ncu(ncu: str, metrics: Sequence[str], child: list[str]) -> tuple[str, str]:
    """Returns what ncu wrote of one configuration's call, and what the program under it printed."""
    log = Path(f"{child[1]}-{child[0]}")
    command = [ncu, "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
    command += ["--profile-from-start", "off", "--target-processes", "application-only", "--clock-control", "none"]
    command += ["--cache-control", "all", "--metrics", ",".join(metrics), sys.executable, __file__, "--child", *child]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        printed, _ = process.communicate(timeout=max(1.0, float(child[2]) + GRACE - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed = f"killed {GRACE:.0f} s after the end: {process.communicate()[0]}"
    return log.read_text(encoding="utf-8") if log.exists() else "", printed


def _call_once(case: Any, config: Any, turns: Path, until: float) -> None:
    """Calls a copy and the kernel once each under the profiler, all else outside it."""
    call, make = _traced(case, config).lower().compile(), _operands(case)
    numbers = jax.ShapeDtypeStruct((COPIED,), jnp.bfloat16)
    copy = jax.jit(lambda x: x + jnp.bfloat16(1)).lower(numbers).compile(UNTRIED)
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
    make = jax.jit(lambda seed: _arguments(case, seed)).lower(SEED).compile(UNTRIED)
    return lambda: make(jnp.int32(0))


def _traced(case: Any, config: Any) -> Any:
    if isinstance(case, RotationCase):
        return jax.jit(case.kernel()).trace(*jax.eval_shape(lambda: case.operands(0)))
    return jax.jit(case.kernel(config)).trace(*jax.eval_shape(lambda: _arguments(case, 0)))


def _bytes(case: Any) -> float:
    if isinstance(case, RotationCase):
        return case.bytes_moved
    return case.bytes_of_codes if isinstance(case, Case | NarrowCase) else case.bytes_of_cache


def _lowered(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields whether each configuration lowers to a kernel for CUDA, and the seconds it takes."""
    for name in arguments.cases:
        config, start = _config(CASES[name]), time.monotonic()
        text = _traced(CASES[name], config).lower(lowering_platforms=("cuda",)).as_text()
        row = {"case": name, "lowered": "mosaic_gpu" in text, "seconds": round(time.monotonic() - start, 1)}
        yield row | {"config": None if config is None else dataclasses.asdict(config)}


if __name__ == "__main__":
    main()
