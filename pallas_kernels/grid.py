"""Every product of a weight, for all numbers of tokens at once: what makes a table of all shapes in minutes.

    a process for each shape     compiles its kernels, some processes at once: lowering keeps Python busy
    its turn on the GPU          XLA's products, which XLA chooses by measuring; then checks and times

A process that dies of a kernel takes the rows of its shape alone with it. A weight's operands are made once, for the
most tokens; fewer tokens are the first rows. Errors are of 256 rows spread over the tokens, of two sets of operands,
against `reference`.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import math
import queue
import subprocess
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
from pallas_kernels.decode import DecodeConfig
from pallas_kernels.measure import Peaks, copies, kernel_microseconds

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
    times: dict[Any, float] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for case, tokens in products:
            weight = _Weight(case, tokens, tried, pool)
            weight.wait()
            if time.monotonic() > end:
                break
            with turn(turns):
                yield from weight.rows(formulations, times, peaks)


@contextlib.contextmanager
def turn(path: Path | None) -> Iterator[None]:
    """Holds the lock of a file, if there is one, while the GPU is measured."""
    if path is None:
        yield
        return
    with path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lines_of(commands: Sequence[Sequence[str]], end: float) -> Iterator[str]:
    """Yields the lines that processes print, as they come; some run at once, in order, until `end`.

    Args:
      commands: their arguments.
      end: by `time.monotonic`.
    """
    waiting, lines, running = list(commands), queue.SimpleQueue[str | None](), 0

    def read(process: subprocess.Popen[str]) -> None:
        late = threading.Timer(max(1.0, end + GRACE - time.monotonic()), process.kill)
        late.start()
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        process.wait()
        late.cancel()
        lines.put(None)

    while waiting or running:
        while waiting and running < PROCESSES and time.monotonic() < end:
            process = subprocess.Popen(waiting.pop(0), stdout=subprocess.PIPE, text=True)
            threading.Thread(target=read, args=(process,), daemon=True).start()
            running += 1
        if not running:
            return
        line = lines.get()
        if line is None:
            running -= 1
        else:
            yield line


class _Weight:
    """One weight's products, whose programs a pool of threads compiles."""

    def __init__(self, case: Any, tokens: tuple[int, ...], tried: Tried, pool: ThreadPoolExecutor) -> None:
        self.case, self.pool = case, pool
        self.cases = [dataclasses.replace(case, tokens=count) for count in tokens]
        self.rows_of = {each.tokens: _sampled(each.tokens) for each in self.cases}
        self.make = pool.submit(self._compiled_operands)
        self.programs = {each: self._programs(each, tried(each)) for each in self.cases}

    def wait(self) -> None:
        """Returns when everything is compiled, or has failed."""
        futures = [self.make]
        for cut, judge, kernels in self.programs.values():
            futures += [cut, judge, *(kernel for _, kernel in kernels)]
        concurrent.futures.wait(futures)

    def rows(
        self, formulations: Formulations, times: dict[Any, float], peaks: Peaks
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yields the rows of all numbers of tokens."""
        try:
            make, prepare = self.make.result()
            given = [make(jnp.int32(seed)) for seed in range(2)]
            weights = [prepare(each) for each in given]
            weights += [prepare(make(jnp.int32(seed))) for seed in range(2, copies(self.case.bytes_of_codes))]
            own, bf16_errors = self._xla(given, formulations, times)
        except FAILURES as error:
            yield self.case, {**dataclasses.asdict(self.case), "failure": f"{type(error).__name__}: {error}"[:300]}
            return
        expected = self._expected(given)
        for case in self.cases:
            cut, judge, kernels = self.programs[case]
            of_tokens = [cut.result()(each.x, each.steps, each.shift) for each in given]
            sets = [(*of_tokens[index % 2], weight) for index, weight in enumerate(weights)]
            beside = {"bf16_error": bf16_errors[case], "xla": own[case]}
            found = [
                _row(case, config, kernel, judge, sets, [each[case] for each in expected], beside, peaks)
                for config, kernel in kernels
            ]
            right = [row for row in found if not math.isnan(row.get("microseconds", math.nan))]
            best = min(right, key=lambda row: row["microseconds"], default=None)
            yield from ((case, row) for row in found if row is not best)
            if best is not None:
                yield case, best | {"chosen": True}

    def _compiled_operands(self) -> tuple[Any, Any]:
        make = jax.jit(self.case.operands).lower(jax.ShapeDtypeStruct((), jnp.int32)).compile()
        return make, jax.jit(self.case.prepare).lower(self._given()).compile()

    def _given(self) -> Any:
        return jax.eval_shape(lambda: self.case.operands(0))

    def _programs(
        self, case: Any, configs: Sequence[Config]
    ) -> tuple[Future[Any], Future[Any], list[tuple[Config, Future[Any]]]]:
        def cut() -> Any:
            given, count = self._given(), case.tokens
            first = jax.jit(lambda *arrays: tuple(array[:count] for array in arrays))
            return first.lower(given.x, given.steps, given.shift).compile()

        def judge() -> Any:
            places = self.rows_of[case.tokens]
            found = jax.ShapeDtypeStruct((case.tokens, case.outputs), jnp.bfloat16)
            expected = jax.ShapeDtypeStruct((len(places), case.outputs), jnp.float32)
            return jax.jit(functools.partial(_judged, places)).lower(found, found, expected).compile()

        def kernel(config: Config) -> Any:
            given = jax.eval_shape(lambda: case.operands(0))
            weight = jax.eval_shape(case.prepare, given)
            return jax.jit(case.kernel(config)).lower(given.x, given.steps, given.shift, weight).compile()

        submit = self.pool.submit
        return submit(cut), submit(judge), [(config, submit(kernel, config)) for config in configs]

    def _expected(self, given: list[Any]) -> list[dict[Any, jax.Array]]:
        """Returns the checked rows of each case in float32, for each set of operands: few tokens are the first rows."""
        most = min(CHECKED, self.case.tokens)
        meaning = jax.jit(dataclasses.replace(self.case, tokens=most).meaning)
        found = []
        for each in given:
            prefix = meaning(_of_rows(each, np.arange(most)))
            found.append(
                {
                    case: prefix[: case.tokens] if case.tokens <= most else meaning(_of_rows(each, places))
                    for case, places in zip(self.cases, self.rows_of.values(), strict=True)
                }
            )
        return found

    def _xla(
        self, given: list[Any], formulations: Formulations, times: dict[Any, float]
    ) -> tuple[dict[Any, dict[str, float]], dict[Any, float]]:
        """Returns microseconds of XLA's formulations by case and name, and the error of bfloat16."""
        found: dict[Any, dict[str, float]] = {case: {} for case in self.cases}
        errors = dict.fromkeys(self.cases, math.nan)
        expected = self._expected(given[:1])[0]
        make = self.make.result()[0]
        for name in sorted({name for case in self.cases for name in formulations(case)}):
            cases = [case for case in self.cases if name in formulations(case)]
            keys = {case: (name, case.tokens, case.outputs, case.inputs) for case in cases}
            function, of_most = cases[-1].xla()[name]
            arguments = jax.jit(lambda given, most=cases[-1].tokens, of=of_most: of(_of_rows(given, np.s_[:most])))
            first = arguments(given[0])
            untimed = [case for case in cases if keys[case] not in times]
            count = copies(WIDTHS.get(name, 0.5) * self.case.outputs * self.case.inputs) if untimed else 1
            sets = [first, *(arguments(make(jnp.int32(seed))) for seed in range(1, count))]
            leading = LEADING.get(name, 1)

            def cut(one: tuple[Any, ...], count: int, leading: int = leading) -> tuple[Any, ...]:
                return (*(array[:count] for array in one[:leading]), *one[leading:])

            def compiled(case: Any, function: Any = function, first: Any = first, cut: Any = cut) -> Any:
                return jax.jit(function).lower(*jax.eval_shape(lambda: cut(first, case.tokens))).compile()

            needed = cases if name == "bfloat16" else untimed
            with ThreadPoolExecutor(len(cases)) as pool:  # XLA lets one of them at a time measure
                calls = dict(zip(needed, pool.map(compiled, needed), strict=True))
            for case in cases:
                if case in untimed:
                    own = [cut(one, case.tokens) for one in sets]
                    times[keys[case]] = kernel_microseconds(calls[case], own)[0]
                found[case][name] = times[keys[case]]
                if name == "bfloat16":
                    product = calls[case](*cut(first, case.tokens))
                    errors[case] = float(_error(product[self.rows_of[case.tokens]], expected[case]))
        return found, errors


def _row(
    case: Any,
    config: Config,
    kernel: Future[Any],
    judge: Future[Any],
    sets: list[tuple[Any, ...]],
    expected: list[jax.Array],
    beside: dict[str, Any],
    peaks: Peaks,
) -> dict[str, Any]:
    row = {**dataclasses.asdict(case), "kernel": "decode" if isinstance(config, DecodeConfig) else "prefill"}
    row["config"] = dataclasses.asdict(config)
    try:
        call = kernel.result()
        judged = [judge.result()(call(*sets[seed]), call(*sets[seed]), expected[seed]) for seed in range(2)]
        row |= {"errors": [float(error) for error, _ in judged], "same_bits": all(bool(same) for _, same in judged)}
        row |= beside
        if not row["same_bits"] or not max(row["errors"]) < 2.0**-8:  # the rounding of operands and output to bfloat16
            return row | {"target": f"WRONG: errors {row['errors']}, same bits: {row['same_bits']}"}
        row["microseconds"], row["kernels"] = kernel_microseconds(call, sets)
        return row | peaks.compared(case, row["microseconds"], row["xla"])
    except FAILURES as error:
        return row | {"failure": f"{type(error).__name__}: {error}"[:300]}


def _sampled(tokens: int) -> Int[np.ndarray, "rows"]:
    """Returns which rows are checked: all of few, the last of each equal part of many."""
    count = min(tokens, CHECKED)
    return (np.arange(1, count + 1) * tokens) // count - 1


def _of_rows(given: Any, places: Any) -> Any:
    return given._replace(x=given.x[places], steps=given.steps[places], shift=given.shift[places])


def _judged(
    places: Int[np.ndarray, "rows"], found: jax.Array, again: jax.Array, expected: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _error(found[places], expected), jnp.all(found == again)


def _error(found: jax.Array, expected: jax.Array) -> jax.Array:
    return jnp.linalg.norm(found.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
