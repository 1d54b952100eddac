"""Rows of the benchmark for decode attention: errors, times, issue 7's targets; `bench.py --kinds attention`."""

import dataclasses
import functools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp

from pallas_kernels import grid
from pallas_kernels.attention_case import (
    AttentionCase,
    bfloat16_attentions,
    bfloat16_operands,
    random_legal_attention,
    relative_error,
)
from pallas_kernels.kivi_case import KiviCase
from pallas_kernels.measure import WITHOUT_AUTOTUNING

# Processes share the cases and take turns on the GPU, as in `grid`: lowering keeps Python busy.

type AnyCase = AttentionCase | KiviCase
type Times = Callable[[Callable[..., Any], list[tuple[Any, ...]]], tuple[float, int]]

BEYOND_CACHE: Final = 120e6  # bytes of caches that one round reads
LARGEST_DENSE: Final = 3e9  # bytes of keys and values in bfloat16 that are compared with
WRONG: Final = 2.0**-8  # relative errors that are too large, as in tests/kernels/test_attention.py
AS_GOOD: Final = 1.1  # of bfloat16's own error, likewise
THREADS: Final = 3  # of a process
FAILURES: Final = (ValueError, RuntimeError)  # of compiling and running
SEED: Final = jax.ShapeDtypeStruct((), jnp.int32)
NAMES: Final = ("kind", "rows", "heads", "kv_heads", "dim", "tokens", "page", "group")
LLAMA: Final = (32, 8, 128)  # query heads, KV heads and numbers of a head of Llama-3.1-8B
SMOLLM2: Final = (9, 3, 64)
TARGETS: Final[tuple[tuple[AnyCase, float | None, float | None, float | None], ...]] = (
    # share of the copy, times XLA's bfloat16, times cuDNN's: issue 7
    (AttentionCase("kv4", 16, *LLAMA, 4096), 0.7, 7.0, 2.5),
    (AttentionCase("kv4", 16, *LLAMA, 8192), 0.7, 7.0, 2.5),
    (AttentionCase("kv4", 64, *LLAMA, 4096), 0.7, 7.0, 2.5),
    (AttentionCase("kv4", 1, *LLAMA, 32768), 0.6, None, None),
    (AttentionCase("kv4", 1, *LLAMA, 131072), 0.7, None, None),
    (AttentionCase("kv4", 16, *LLAMA, 32768), 0.7, None, None),
    (KiviCase(2, 16, *LLAMA, 32768), None, None, None),
    (KiviCase(2, 16, *LLAMA, 32768, group=128), None, None, None),
    (KiviCase(4, 16, *LLAMA, 32768), None, None, None),
    (AttentionCase("kv4", 16, *LLAMA, 8192, page=64), None, None, None),
    (AttentionCase("kv8", 16, *LLAMA, 8192), None, None, None),
    (AttentionCase("kv16", 16, *LLAMA, 8192, grid="none"), None, None, None),
    (AttentionCase("kv4", 16, *SMOLLM2, 8192), None, None, None),
)


def rows_by_processes(check: int, end: float) -> Iterator[dict[str, Any]]:
    """Yields the rows of all cases, made by processes, and what is missing last.

    Args:
      check: how many random shapes, as of `rows`.
      end: when to begin nothing new, by `time.monotonic`.
    """
    count, found = check + len(TARGETS), []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pallas_kernels.bench", "--kinds", "attention", "--check", str(check)]
        command += ["--turns", f"{folder}/turns", "--results", folder]
        shared = [range(first, count, grid.PROCESSES) for first in range(min(grid.PROCESSES, count))]
        for text in grid.lines_of([[*command, "--cases", *map(str, own)] for own in shared], end):
            if text.startswith("{"):
                found.append(json.loads(text))
                yield found[-1]
    yield {"missing": missing(found)}


def rows(
    times: Times, copy: Callable[[], float], check: int, end: float, own: Sequence[int], turns: Path
) -> Iterator[dict[str, Any]]:
    """Yields rows of cases with or beside a target and of random legal shapes.

    Args:
      times: measures a call over sets of operands: microseconds and kernels.
      copy: gives the bandwidth of a copy in GB/s.
      check: how many random shapes there are, behind those with a target.
      end: when to begin nothing new, by `time.monotonic`.
      own: which cases.
      turns: the file whose lock lets one process at a time measure.
    """
    every: list[AnyCase] = [*(case for case, *_ in TARGETS), *random_legal_attention(0, check)]
    with ThreadPoolExecutor(THREADS) as pool:
        programs = [_Programs(every[index], TARGETS[index][1:] if index < len(TARGETS) else None) for index in own]
        compiling = [pool.submit(each.compile) for each in programs]
        for program, compiled in zip(programs, compiling, strict=True):
            failed = compiled.exception()
            if time.monotonic() > end:
                pool.shutdown(wait=False, cancel_futures=True)
                return
            if failed is not None:
                yield program.row | {"failure": f"{type(failed).__name__}: {failed}"[:300]}
                continue
            with grid.turn(turns):
                yield program.measured(times, copy)


class _Programs:
    """One case's programs and row."""

    def __init__(self, case: AnyCase, targets: Sequence[float | None] | None) -> None:
        self.case, self.targets = case, targets
        self.row: dict[str, Any] = {"kind": case.kind, **dataclasses.asdict(case)}
        self.shape = (case.rows, case.heads, case.kv_heads, case.dim, case.tokens)
        self.dense = 4.0 * case.rows * case.kv_heads * case.dim * case.tokens

    def compile(self) -> None:
        """Compiles everything; this needs the processor alone."""
        case = self.case
        self.row |= {"config": dataclasses.asdict(case.config())}
        given = jax.eval_shape(lambda: case.operands(0))
        self.kernel = jax.jit(case.kernel(case.config())).lower(*given).compile()
        self.operands, self.meaning, self.rounded = (
            jax.jit(each).lower(SEED).compile(WITHOUT_AUTOTUNING)
            for each in (case.operands, case.meaning, case.rounded)
        )

    def _of_others(self, times: Times) -> dict[str, float]:
        """Returns microseconds of attention in bfloat16 by name, which XLA compiles by measuring."""
        found = {}
        if self.targets and any(self.targets[1:]) and self.dense <= LARGEST_DENSE:
            for name, function in bfloat16_attentions().items():
                make = jax.jit(functools.partial(bfloat16_operands, self.shape, name))
                sets = [make(jnp.int32(seed)) for seed in range(_copies(self.dense))]
                found[name] = times(jax.jit(function).lower(*sets[0]).compile(), sets)[0]
        return found

    def measured(self, times: Times, copy: Callable[[], float]) -> dict[str, Any]:
        """Returns the row."""
        row = self.row
        try:
            row |= {"microseconds_of": self._of_others(times)}
            count = 1 if self.targets is None else _copies(self.case.bytes_of_cache)
            sets = [tuple(self.operands(jnp.int32(seed))) for seed in range(count)]
            expected = self.meaning(jnp.int32(0))
            own = relative_error(self.rounded(jnp.int32(0)), expected)
            found = self.kernel(*sets[0])
            same = bool((found == self.kernel(*sets[0])).all())
            row |= {"bf16_error": own, "error": relative_error(found, expected), "same_bits": same}
            if not same or not row["error"] < min(WRONG, AS_GOOD * own):
                row["target"] = "WRONG"
            elif self.targets is not None:
                row["microseconds"], row["kernels"] = times(self.kernel, sets)
                row["rate"] = self.case.bytes_of_cache / row["microseconds"] / 1e3
                row |= {"peak": copy(), "of_peak": row["rate"] / copy()}
                row |= _verdict(row, self.targets)
        except FAILURES as error:
            row["failure"] = f"{type(error).__name__}: {error}"[:300]
        return row


def missing(found: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the cases with or beside a target of which no row has a time."""
    timed = {tuple(row.get(name) for name in NAMES) for row in found if "microseconds" in row}
    every = {
        tuple(({"kind": case.kind} | dataclasses.asdict(case)).get(name) for name in NAMES) for case, *_ in TARGETS
    }
    return [str(each) for each in sorted(every - timed, key=str)]


def line(row: dict[str, Any]) -> str:
    """Returns a row in words."""
    if "missing" in row:
        return f"rows missing: {len(row['missing'])} " + ", ".join(row["missing"])
    text = f"{row['kind']} {row['rows']} x {row['heads']}/{row['kv_heads']} x {row['dim']}, {row['tokens']}".ljust(34)
    if "failure" in row:
        return f"{text} FAILED: {row['failure'][:200]}"
    if "rate" in row:
        over = " ".join(
            f"{name} {row['microseconds_of'][name] / row['microseconds']:.2f}" for name in row["microseconds_of"]
        )
        text += f"{row['microseconds']:8.1f} {row['of_peak']:7.0%}  times {over or '-'} "
    return f"{text}   {row['error']:.2e} {row['bf16_error']:.2e} {row.get('target', 'right')} {row['config']}"


def _verdict(row: dict[str, Any], least: Sequence[float | None]) -> dict[str, Any]:
    """Returns which of the issue's targets a row meets or misses."""
    figures = {"of_peak": row["of_peak"]}
    figures |= {name: row["microseconds_of"].get(name, math.nan) / row["microseconds"] for name in ("xla", "cudnn")}
    missed = [
        f"{name} {figure:.2f} < {low}"
        for (name, figure), low in zip(figures.items(), least)
        if low and not figure >= low
    ]
    return {"target": "missed: " + ", ".join(missed) if missed else "met"} if any(least) else {"target": "right"}


def _copies(nbytes: float) -> int:
    return max(2, min(16, math.ceil(BEYOND_CACHE / nbytes)))
