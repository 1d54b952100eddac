"""Every product of a weight, for all numbers of tokens at once: what makes a table of all shapes in minutes.

    a process for each shape     compiles, some processes at once: lowering keeps Python busy
    its turn on the GPU          XLA's products, which XLA chooses by measuring; then checks, and at last all times

A process that dies of a kernel takes the rows of its shape alone with it. A weight's operands are made once, for the
most tokens; fewer tokens are the first rows. Errors are of 256 rows spread over the tokens, of two sets of operands,
against `reference`. XLA's products are compiled and timed once for all weights of a shape: their operands differ in
numbers alone.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from pallas_kernels.configs import Config
from pallas_kernels.decode_config import DecodeConfig
from pallas_kernels.measure import WITHOUT_AUTOTUNING, Peaks, Timed, copies, each_microseconds

type Tried = Callable[[Any], Sequence[Config]]
type Formulations = Callable[[Any], Sequence[str]]

PROCESSES: Final = 8
THREADS: Final = 3  # of a process
GRACE: Final = 15.0  # seconds after the end, when a process is killed
CHECKED: Final = 256  # rows of a product whose errors are computed
LEADING: Final = {"int8 with scales": 2}  # arguments of a formulation whose rows are tokens; 1 where not named
WIDTHS: Final = {"bfloat16": 2.0, "int8 with scales": 1.0}  # bytes of a weight's number in a formulation; else a half
FAILURES: Final = (ValueError, RuntimeError)  # of compiling and running


def rows(
    products: Sequence[tuple[Any, tuple[int, ...]]],
    tried: Tried,
    formulations: Formulations,
    peaks: Peaks,
    end: float,
    turns: Path | None = None,
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yields cases with their rows, the chosen configuration's last.

    Args:
      products: cases with the most tokens, and all numbers of tokens.
      tried: the configurations to try for a case.
      formulations: the names of XLA's formulations to time beside a case.
      peaks: the machine's.
      end: when to begin nothing new, by `time.monotonic`.
      turns: the file whose lock lets one process at a time measure.
    """
    timed: dict[Any, tuple[Any, float]] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for case, tokens in products:
            watch = Stopwatch()
            weight = _Weight(case, tokens, tried, formulations, pool)
            weight.wait()
            watch.lap("compiled")
            with turn(turns):
                watch.lap("waited")
                if time.monotonic() > end:
                    break
                yield from weight.rows(timed, peaks, watch)


class Stopwatch:
    """Seconds that parts of a job took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """Counts what passed since the last lap under a name."""
        now = time.monotonic()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self._last, 2)
        self._last = now


@contextlib.contextmanager
def turn(path: Path | None) -> Iterator[None]:
    """Holds the lock of a file, if there is one, while the GPU is measured."""
    if path is None:
        yield
        return
    with path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def product(row: dict[str, Any]) -> tuple[Any, ...]:
    """Returns the product that a row is of."""
    return row["kind"], row["tokens"], row["outputs"], row["inputs"]


def measured(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yields the rows of files that have the time of a product."""
    for path in paths:
        rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        yield from (row for row in rows if "microseconds" in row and "outputs" in row)


def timed(paths: Sequence[Path]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Returns the rows of files whose configurations were chosen and timed, by product."""
    return {product(row): row for row in measured(paths) if "chosen" in row}


def lines_of(commands: Sequence[Sequence[str]], end: float) -> Iterator[str]:
    """Yields the lines that processes print, as they come; some run at once, in order, until `end`.

    Args:
      commands: their arguments, behind which each has `--seconds`, those that are left when it begins.
      end: by `time.monotonic`.
    """
    waiting, lines, running = list(commands), queue.SimpleQueue[str | None](), 0

    def read(process: subprocess.Popen[str]) -> None:
        late = threading.Timer(max(1.0, end + GRACE - time.monotonic()), process.kill)
        late.start()
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
        late.cancel()
        if process.returncode:
            sys.stderr.write(f"exit status {process.returncode} of {process.args!r}\n")
        lines.put(None)

    while waiting or running:
        while waiting and running < PROCESSES and time.monotonic() < end:
            command = [*waiting.pop(0), "--seconds", str(end - time.monotonic())]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            threading.Thread(target=read, args=(process,), daemon=True).start()
            running += 1
        if not running:
            return
        line = lines.get()
        if line is None:
            running -= 1
        else:
            yield line


class _Formulation:
    """One of XLA's formulations of a weight's products: what makes its arguments, compiled by a pool of threads."""

    def __init__(self, name: str, cases: list[Any], given: Any, pool: ThreadPoolExecutor) -> None:
        self.name, self.cases, self.leading = name, cases, LEADING.get(name, 1)
        self.function, arguments = cases[-1].xla()[name]
        most = cases[-1].tokens

        def of_most(given: Any) -> Any:
            return arguments(_of_rows(given, np.s_[:most]))

        self.shapes = jax.eval_shape(of_most, given)
        self.make = pool.submit(_compiled, of_most, given)
        self.cuts = {
            case: pool.submit(_compiled, functools.partial(_first, case.tokens), *self.shapes[: self.leading])
            for case in cases
        }

    def arguments(self, case: Any, made: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns a case's arguments, the first rows of what was made for the most tokens."""
        return (*self.cuts[case].result()(*made[: self.leading]), *made[self.leading :])

    def compile(self, case: Any) -> Any:
        """Compiles a case's product, which XLA chooses by measuring: in turn."""
        cut = jax.eval_shape(functools.partial(_first, case.tokens), *self.shapes[: self.leading])
        return jax.jit(self.function).lower(*cut, *self.shapes[self.leading :]).compile()

    def key(self, case: Any) -> tuple[Any, ...]:
        """Returns what the product's time depends on."""
        return self.name, case.tokens, case.outputs, case.inputs


class _Weight:
    """One weight's products, whose programs a pool of threads compiles."""

    def __init__(
        self, case: Any, tokens: tuple[int, ...], tried: Tried, formulations: Formulations, pool: ThreadPoolExecutor
    ) -> None:
        self.case, self.pool = case, pool
        self.cases = [dataclasses.replace(case, tokens=count) for count in tokens]
        given = jax.eval_shape(lambda: case.operands(0))
        weight = jax.eval_shape(case.prepare, given)
        self.kernels = {
            each: [(config, pool.submit(_compiled_kernel, each, config, given, weight)) for config in tried(each)]
            for each in self.cases
        }
        self.make = pool.submit(_compiled, case.operands, jax.ShapeDtypeStruct((), jnp.int32))
        self.prepare = pool.submit(_compiled, case.prepare, given)
        self.expected = pool.submit(_compiled, functools.partial(_expected, case, tokens), given)
        self.cuts = {each: pool.submit(_compiled, functools.partial(_cut, each.tokens), given) for each in self.cases}
        self.judges = {each: pool.submit(_compiled_judge, each) for each in self.cases}
        self.formulations = [
            _Formulation(name, [each for each in self.cases if name in formulations(each)], given, pool)
            for name in sorted({name for each in self.cases for name in formulations(each)})
        ]

    def wait(self) -> None:
        """Returns when everything is compiled, or has failed."""
        futures = [self.make, self.prepare, self.expected, *self.cuts.values(), *self.judges.values()]
        futures += [kernel for kernels in self.kernels.values() for _, kernel in kernels]
        futures += [future for each in self.formulations for future in (each.make, *each.cuts.values())]
        concurrent.futures.wait(futures)

    def rows(
        self, timed: dict[Any, tuple[Any, float]], peaks: Peaks, watch: Stopwatch
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yields the rows of all numbers of tokens.

        Args:
          timed: programs and microseconds of XLA's products, which other weights of the shape have too.
          peaks: the machine's.
          watch: counts what parts take.
        """
        try:
            found = list(self._rows(timed, peaks, watch))
        except FAILURES as error:
            yield self.case, {**dataclasses.asdict(self.case), "failure": f"{type(error).__name__}: {error}"[:300]}
            return
        for case in self.cases:
            own = [row for of, row in found if of is case]
            right = [row for row in own if not math.isnan(row.get("microseconds", math.nan))]
            best = min(right, key=lambda row: row["microseconds"], default=None)
            yield from ((case, row) for row in own if row is not best)
            if best is not None:
                yield case, best | {"chosen": True, "seconds": watch.seconds}

    def _rows(
        self, timed: dict[Any, tuple[Any, float]], peaks: Peaks, watch: Stopwatch
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
        make, prepare = self.make.result(), self.prepare.result()
        given = [make(jnp.int32(seed)) for seed in range(2)]
        weights = [prepare(each) for each in given]
        weights += [prepare(make(jnp.int32(seed))) for seed in range(2, copies(self.case.bytes_of_codes))]
        expected = [dict(zip(self.cases, self.expected.result()(each), strict=True)) for each in given]
        jax.block_until_ready((weights, [list(each.values()) for each in expected]))
        watch.lap("operands")
        untimed, errors = self._xla(given[0], expected[0], timed)
        watch.lap("xla")
        found: list[tuple[Any, dict[str, Any]]] = []
        calls: list[tuple[dict[str, Any], Timed]] = []
        for case in self.cases:
            of_tokens = [self.cuts[case].result()(each) for each in given]
            sets = [(*of_tokens[index % 2], weight) for index, weight in enumerate(weights)]
            for config, kernel in self.kernels[case]:
                row = _judged(case, config, kernel, self.judges[case].result(), sets, [each[case] for each in expected])
                row["bf16_error"] = errors[case]
                found.append((case, row))
                if "target" not in row and "failure" not in row:
                    calls.append((row, (kernel.result(), sets)))
        watch.lap("checked")
        jobs: list[tuple[int, Any, Timed]] = [(key[1], key, call) for key, call in untimed.items()]
        jobs += [(row["tokens"], row, call) for row, call in calls]
        jobs.sort(key=lambda job: job[0])  # what takes the most power last, and XLA's product beside ours
        times = each_microseconds([call for *_, call in jobs])
        watch.lap("timed")
        for (_, what, (call, _)), (microseconds, kernels) in zip(jobs, times, strict=True):
            if isinstance(what, dict):
                what |= {"microseconds": microseconds, "kernels": kernels}
            else:
                timed[what] = call, microseconds
        for case, row in found:
            row["xla"] = {each.name: timed[each.key(case)][1] for each in self.formulations if case in each.cases}
            if "microseconds" in row:
                row |= peaks.compared(case, row["microseconds"], row["xla"])
            yield case, row

    def _xla(
        self, given: Any, expected: dict[Any, jax.Array], timed: dict[Any, tuple[Any, float]]
    ) -> tuple[dict[Any, Timed], dict[Any, float]]:
        """Returns XLA's products that are not timed yet by key, with their arguments, and the errors of bfloat16."""
        untimed: dict[Any, Timed] = {}
        errors = dict.fromkeys(self.cases, math.nan)
        for each in self.formulations:
            cases = [case for case in each.cases if each.key(case) not in timed]
            count = copies(WIDTHS.get(each.name, 0.5) * self.case.outputs * self.case.inputs) if cases else 1
            seeds = (self.make.result()(jnp.int32(seed)) for seed in range(1, count))
            sets = [each.make.result()(one) for one in (given, *seeds)]
            with ThreadPoolExecutor(len(each.cases)) as pool:  # XLA lets one of them at a time measure
                calls = dict(zip(cases, pool.map(each.compile, cases), strict=True))
            for case, call in calls.items():
                untimed[each.key(case)] = call, [each.arguments(case, one) for one in sets]
            for case in each.cases if each.name == "bfloat16" else ():
                call = calls[case] if case in calls else timed[each.key(case)][0]
                found = call(*each.arguments(case, sets[0]))
                errors[case] = float(self.judges[case].result()(found, found, expected[case])[0])
        return untimed, errors


def _judged(
    case: Any, config: Config, kernel: Future[Any], judge: Any, sets: list[tuple[Any, ...]], expected: list[jax.Array]
) -> dict[str, Any]:
    """Returns a configuration's row: its errors, and whether it has the same bits twice."""
    row = {**dataclasses.asdict(case), "kernel": "decode" if isinstance(config, DecodeConfig) else "prefill"}
    row["config"] = dataclasses.asdict(config)
    try:
        call = kernel.result()
        judged = [judge(call(*sets[seed]), call(*sets[seed]), expected[seed]) for seed in range(2)]
        row |= {"errors": [float(error) for error, _ in judged], "same_bits": all(bool(same) for _, same in judged)}
    except FAILURES as error:
        return row | {"failure": f"{type(error).__name__}: {error}"[:300]}
    if not row["same_bits"] or not max(row["errors"]) < 2.0**-8:  # the rounding of operands and output to bfloat16
        row["target"] = f"WRONG: errors {row['errors']}, same bits: {row['same_bits']}"
    return row


def _compiled(function: Callable[..., Any], *shapes: Any) -> Any:
    """Compiles without the GPU, on which another process may be measuring."""
    return jax.jit(function).lower(*shapes).compile(WITHOUT_AUTOTUNING)


def _compiled_kernel(case: Any, config: Config, given: Any, weight: Any) -> Any:
    x, steps, shift = jax.eval_shape(functools.partial(_cut, case.tokens), given)
    return jax.jit(case.kernel(config)).lower(x, steps, shift, weight).compile()


def _compiled_judge(case: Any) -> Any:
    places = _sampled(case.tokens)
    found = jax.ShapeDtypeStruct((case.tokens, case.outputs), jnp.bfloat16)
    expected = jax.ShapeDtypeStruct((len(places), case.outputs), jnp.float32)
    return _compiled(functools.partial(_judge, places), found, found, expected)


def _cut(count: int, given: Any) -> tuple[jax.Array, ...]:
    return _first(count, given.x, given.steps, given.shift)


def _first(count: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(array[:count] for array in arrays)


def _expected(case: Any, tokens: Sequence[int], given: Any) -> list[jax.Array]:
    """Returns the checked rows in float32 for each number of tokens: all of them in one product."""
    places = [_sampled(count) for count in tokens]
    every = np.unique(np.concatenate(places))
    product = dataclasses.replace(case, tokens=len(every)).meaning(_of_rows(given, every))
    return [product[np.searchsorted(every, own)] for own in places]


def _sampled(tokens: int) -> Int[np.ndarray, "rows"]:
    """Returns which rows are checked: all of few, the last of each equal part of many."""
    count = min(tokens, CHECKED)
    return (np.arange(1, count + 1) * tokens) // count - 1


def _of_rows(given: Any, places: Any) -> Any:
    return given._replace(x=given.x[places], steps=given.steps[places], shift=given.shift[places])


def _judge(
    places: Int[np.ndarray, "rows"], found: jax.Array, again: jax.Array, expected: jax.Array
) -> tuple[jax.Array, jax.Array]:
    error = jnp.linalg.norm(found[places].astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    return error, jnp.all(found == again)
