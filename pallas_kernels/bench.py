"""Times the kernels beside XLA on this machine's GPU: one line for each product, and a file of JSON lines.

    python -m pallas_kernels.bench                                  the products that issue 6 sets targets for
    python -m pallas_kernels.bench --kinds w4a16 --shapes 4096x4096 --tokens 1 16 --tune 8
    python -m pallas_kernels.bench --kinds attention --check 20     decode attention over packed caches
    python -m pallas_kernels.bench --check 20                       random legal shapes, errors alone
    python -m pallas_kernels.bench --grid --seconds 400             every kernel and shape; then what is missing
    python -m pallas_kernels.bench --grid --kinds w4a16 --shapes 8192x8192 --tokens 1 16 --seconds 60
    python -m pallas_kernels.bench --grid --seconds 400 --after OLD.jsonl   what an earlier run of that day left missing

Needs jax, numpy and jaxtyping alone. Times are kernel times by CUPTI, the sum over a call's kernels, the median over
calls whose weights rotate beyond the second cache. "of peak": bytes of codes over the copy of 512 MiB that this run
measured (up to 64 tokens), or operations over XLA's product of 8192^3 in bfloat16 or int8. Errors are relative to the
product in float32, in the Frobenius norm, ours and that of XLA's bfloat16 on the same numbers.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import jax

from pallas_kernels import attention_bench, configs, grid, narrow_case, report, shapes, tuned
from pallas_kernels.cases import KINDS, Case, Product, random_legal_cases, relative_error
from pallas_kernels.decode_config import DecodeConfig
from pallas_kernels.measure import Peaks, copies, kernel_microseconds
from pallas_kernels.narrow_case import NarrowCase, narrow_cases
from pallas_kernels.outlier_case import FEATURES, SHAPE, OutlierCase
from pallas_kernels.rotation_case import ORDERS, TOKENS, RotationCase
from pallas_kernels.targets import TARGETS, verdict

type Work = Case | NarrowCase

BYTES_OF_BF16: Final = 2.0
BF16_ROUNDING: Final = 2.0**-8  # relative: the most that operands and output, rounded to bfloat16, are off together
GROUP: Final = 128
MODELS: Final = (*shapes.LLAMA_8B, *shapes.LLAMA_70B)
ATTENTION: Final = "attention"  # likewise, over packed caches
OUTLIERS: Final = "outliers"  # likewise: int8 products with features kept as numbers
ROTATION: Final = "rotation"  # a kind of its own: activations rotated and quantized, no product
SHARED: Final = ("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes hold the GPU's memory beside each other
FAILURES: Final = (ValueError, RuntimeError)  # of compiling and running; a kernel that fails is a row that says so
RESERVED: Final = 120.0  # seconds of `--grid` that are kept for what is no product of a weight: 60 did not do
TUNED: Final = 256  # tokens of `--grid` up to which `--tune` tries others: beyond, they were 1 % faster at most
PEAKS: Final = "peaks.json"  # beside the file of `--turns`: what one process measured for all


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = (*KINDS, *narrow_case.KINDS, OUTLIERS, ROTATION, ATTENTION)
    parser.add_argument("--kinds", nargs="+", choices=kinds, help="with --shapes or --tokens")
    parser.add_argument("--shapes", nargs="+", help="weights as OUTPUTSxINPUTS; by default Llama-3.1 and LUT-GEMM's")
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--tune", type=int, default=0, help="configurations to try where the table has no row")
    parser.add_argument("--check", type=int, default=0, help="random legal shapes whose errors to compute first")
    parser.add_argument("--grid", action="store_true", help="all kinds, shapes and tokens, or those named, by weights")
    parser.add_argument("--after", nargs="+", type=Path, default=[], help="rows of --grid whose products to leave out")
    parser.add_argument("--turns", type=Path, help="file whose lock lets one process at a time measure")
    parser.add_argument("--cases", nargs="+", type=int, default=[], help="of attention, with --turns: which ones")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin nothing new after so long")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder for the JSON lines")
    parser.add_argument("--table", type=Path, help="a copy of the package's table to write, what was measured in it")
    arguments = parser.parse_args()
    os.environ.setdefault(*SHARED)
    end = time.monotonic() + arguments.seconds
    arguments.results.mkdir(parents=True, exist_ok=True)
    day = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    device = jax.devices()[0].device_kind
    path = arguments.results / f"{day}-{device.split()[1].lower() if ' ' in device else device}-kernels.jsonl"
    with path.open("a", encoding="utf-8") as file:

        def write(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        command = "python -m pallas_kernels.bench " + " ".join(sys.argv[1:])
        write({"device": device, "date": day, "jax": jax.__version__, "command": command.strip()})
        chosen = _run(arguments, end, write)
    if arguments.table:
        source = f"{day}, jax {jax.__version__}: kernel time by CUPTI, median"
        arguments.table.write_text(configs.merged(device, source, chosen), encoding="utf-8")
    print(f"rows are in {path}")


def _run(arguments: argparse.Namespace, end: float, write: Callable[[dict[str, Any]], None]) -> list[configs.Row]:
    """Writes and prints all rows; returns those of the table for what was timed."""
    bench, chosen = Bench(arguments.turns), []
    if arguments.cases:
        own = arguments.check, end, arguments.cases, arguments.turns
        for row in attention_bench.rows(kernel_microseconds, bench.peaks.copy_rate, *own):
            print(json.dumps(row), flush=True)
        return []
    if arguments.grid and arguments.turns:
        return _shape(arguments, bench.peaks, end, write)
    if arguments.grid:
        chosen = _grid(arguments, end - (0.0 if arguments.kinds else RESERVED), write)
        if not arguments.kinds:
            _others(bench, arguments, end, write)
        return chosen
    jobs: list[tuple[Work, list[configs.Config]]]
    jobs = [(case, [case.config()]) for case in random_legal_cases(0, arguments.check)]
    jobs += [(case, _tried(case, arguments.tune)) for case in _chosen(arguments)]
    print(report.HEAD)
    with ThreadPoolExecutor(6) as pool:
        compiled = [(case, [(config, pool.submit(_compile, case, config)) for config in tried]) for case, tried in jobs]
        for index, (case, variants) in enumerate(compiled):
            if time.monotonic() > end:
                print(f"out of time: {len(compiled) - index} of {len(compiled)} products not run")
                break
            try:
                for row in bench.rows(case, variants, timed=index >= arguments.check):
                    write(row)
                    print(report.line(case, row), flush=True)
                    if "chosen" in row and "microseconds" in row and isinstance(case, Case):
                        chosen.append(tuned.serving(case, row))
            except FAILURES as error:
                write({**dataclasses.asdict(case), "failure": repr(error)})
                print(f"{case} FAILED before its kernel ran: {error!r}"[:300], flush=True)
        pool.shutdown(wait=False, cancel_futures=True)
    _others(bench, arguments, end, write)
    return chosen


def _others(bench: "Bench", arguments: argparse.Namespace, end: float, write: Callable[[dict[str, Any]], None]) -> None:
    """Writes and prints the rows of kernels that are no product of a weight."""
    asked = arguments.kinds or arguments.shapes or arguments.tokens or arguments.check
    if OUTLIERS in (arguments.kinds or ()) or not asked:
        for features in FEATURES:
            if time.monotonic() < end:
                write(row := bench.outliers(OutlierCase(*SHAPE, features)))
                print(json.dumps(row), flush=True)
    if ROTATION in (arguments.kinds or ()) or not asked:
        for order in ORDERS:
            turn = RotationCase(arguments.tokens[-1] if arguments.tokens else TOKENS, *order)
            if time.monotonic() < end:
                write(row := bench.rotation(turn))
                print(report.rotation_line(turn, row), flush=True)
    if ATTENTION in (arguments.kinds or ()) or not asked:
        for row in attention_bench.rows_by_processes(arguments.check, end):
            write(row)
            print(attention_bench.line(row), flush=True)


def _chosen(arguments: argparse.Namespace) -> Iterator[Work]:
    if not (arguments.kinds or arguments.shapes or arguments.tokens):
        if not arguments.check:
            for kind, (outputs, inputs), tokens, *_ in TARGETS:
                for plain in (each for each in KINDS if each == kind):
                    yield from (_case(plain, count, outputs, inputs) for count in tokens)
                yield from narrow_cases((kind,), [(outputs, inputs)], list(tokens))
        return
    named = (*shapes.LLAMA_8B, *shapes.LLAMA_70B, *shapes.LUT_GEMM)
    sizes = [tuple(map(int, text.split("x"))) for text in arguments.shapes or ()]
    for kind in (kind for kind in KINDS if kind in (arguments.kinds or KINDS)):
        for outputs, inputs in sizes or [(linear.outputs, linear.inputs) for linear in named]:
            yield from (_case(kind, count, outputs, inputs) for count in arguments.tokens or shapes.TOKENS)
    if arguments.kinds:
        every = sizes or [(linear.outputs, linear.inputs) for linear in named]
        yield from narrow_cases(tuple(arguments.kinds), every, arguments.tokens or [1])


def _grid(arguments: argparse.Namespace, end: float, write: Callable[[dict[str, Any]], None]) -> list[configs.Row]:
    """Writes and prints the rows of all shapes, each made by a process; returns those of the table."""
    begin, table = time.monotonic(), tuned.Tuned()

    def keep(row: dict[str, Any]) -> Work:
        of_kind = Case if row["kind"] in KINDS else NarrowCase
        case = of_kind(**{field.name: row[field.name] for field in dataclasses.fields(of_kind)})
        if "microseconds" in row and isinstance(case, Case):
            table.add(case, row)
        return case

    for row in grid.measured(arguments.after):
        keep(row)
    sizes = [size for size in _sizes(arguments) if any(_weights(arguments, *size))]
    missing = dict.fromkeys(
        (case.kind, count, *size) for size in sizes for case, tokens in _weights(arguments, *size) for count in tokens
    )
    print(f"{len(missing)} products\n{report.HEAD}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        commands = []
        for outputs, inputs in sizes:
            given = ["--shapes", f"{outputs}x{inputs}", "--tune", arguments.tune, "--turns", f"{folder}/turns"]
            given += ["--kinds", *(arguments.kinds or (*narrow_case.KINDS, *KINDS))]
            given += ["--tokens", *_tokens(arguments, outputs, inputs)]
            given += ["--results", folder]
            given += ["--after", *(path.resolve() for path in arguments.after)] if arguments.after else []
            commands.append([sys.executable, "-m", "pallas_kernels.bench", "--grid", *map(str, given)])
        for line in grid.lines_of(commands, end):
            if not line.startswith("{"):
                continue
            row = json.loads(line) | {"at": round(time.monotonic() - begin, 1)}
            write(row)
            case = keep(row)
            print(f"{report.line(case, row)} at {row['at']}", flush=True)
            if "microseconds" in row:
                missing.pop(grid.product(row), None)
    write({"missing": [list(each) for each in missing]})
    print(f"rows missing: {len(missing)}", *missing, sep="\n", flush=True)
    return list(table.rows.values())


def _shape(
    arguments: argparse.Namespace, peaks: Peaks, end: float, write: Callable[[dict[str, Any]], None]
) -> list[configs.Row]:
    """Writes and prints the rows of one shape, as JSON; returns none for the table: its parent makes it."""
    ((outputs, inputs),) = _sizes(arguments)

    def tried(case: Work) -> list[configs.Config]:
        return _tried(case, arguments.tune if case.tokens <= TUNED else 0)

    for case, row in grid.rows(list(_weights(arguments, outputs, inputs)), tried, _beside, peaks, end, arguments.turns):
        row |= verdict(case, row) if "chosen" in row else {}
        write(row)
        print(json.dumps(row), flush=True)
    return []


def _sizes(arguments: argparse.Namespace) -> list[tuple[int, int]]:
    """Returns (outputs, inputs) of `--grid`: what a runtime multiplies first."""
    if arguments.shapes:
        return [(int(outputs), int(inputs)) for outputs, inputs in (text.split("x") for text in arguments.shapes)]
    named = (*shapes.JOINED[:2], *shapes.LLAMA_8B, *shapes.LLAMA_70B, *shapes.JOINED[2:], *reversed(shapes.LUT_GEMM))
    return list(dict.fromkeys((linear.outputs, linear.inputs) for linear in named))


def _tokens(arguments: argparse.Namespace, outputs: int, inputs: int) -> tuple[int, ...]:
    alone = all((linear.outputs, linear.inputs) != (outputs, inputs) for linear in (*shapes.JOINED, *MODELS))
    return tuple(sorted(arguments.tokens or (shapes.TOKENS[:1] if alone else shapes.TOKENS)))


def _weights(arguments: argparse.Namespace, outputs: int, inputs: int) -> Iterator[tuple[Work, tuple[int, ...]]]:
    """Yields a case of most tokens for each weight of a shape, and the numbers of tokens; one-token formats first."""
    kinds, done = arguments.kinds or (*KINDS, *narrow_case.KINDS), grid.timed(arguments.after)
    every: list[tuple[Work, tuple[int, ...]]]
    every = [(case, (1,)) for case in narrow_cases(tuple(kinds), [(outputs, inputs)], [1])]
    tokens = _tokens(arguments, outputs, inputs)
    every += [(_case(kind, tokens[-1], outputs, inputs), tokens) for kind in KINDS if kind in kinds]
    for case, counts in every:
        left = tuple(count for count in counts if (case.kind, count, outputs, inputs) not in done)
        if left:
            yield dataclasses.replace(case, tokens=left[-1]), left


def _beside(case: Work) -> tuple[str, ...]:
    """Returns XLA's formulations that `--grid` times: of int4 only where the issue compares with the best."""
    asked = ((kind, shape) for kind, shape, tokens, *least in TARGETS if case.tokens in tokens and least[2])
    every = (case.kind, (case.outputs, case.inputs)) in asked
    return tuple(name for name in case.xla() if every or name in ("bfloat16", "int8 with scales"))


def _case(kind: configs.Kind, tokens: int, outputs: int, inputs: int) -> Case:
    return Case(kind, tokens, outputs, inputs, inputs // GROUP if kind == "w4a16" else 1)


def _tried(case: Work, count: int) -> list[configs.Config]:
    """Returns the configuration in use, and others where it comes from the rule and tuning is wanted."""
    found: list[configs.Config] = [case.config()]
    if isinstance(case, Case):
        found = configs.candidates(case.kind, case.tokens, case.outputs, case.inputs, case.groups)
        found = found[: 1 if configs.in_table(found[0]) else 1 + count]
    return found


def _compile(case: Any, config: configs.Config) -> Product:
    """Compiles a kernel; this needs the processor alone, so that several do at once while another one is timed."""
    given = jax.eval_shape(lambda: case.operands(0))
    weight = jax.eval_shape(case.prepare, given)
    return jax.jit(case.kernel(config)).lower(given.x, given.steps, given.shift, weight).compile()


class Bench:
    """What one run measures once: XLA's products and the machine's peaks."""

    def __init__(self, turns: Path | None = None) -> None:
        self._baselines: dict[Any, tuple[Product, float]] = {}
        self.peaks = Peaks(functools.partial(print, flush=True), turns and turns.with_name(PEAKS))

    def rows(self, case: Any, variants: list[tuple[configs.Config, Future[Any]]], *, timed: bool) -> Iterator[Any]:
        """Yields a row for each configuration of a product, the fastest last where several are tried."""
        given = [case.operands(seed) for seed in range(2)]
        expected = [case.meaning(each) for each in given]
        sets = [(each.x, each.steps, each.shift, case.prepare(each)) for each in given]
        for seed in range(2, copies(case.bytes_of_codes) if timed else 2):
            other = case.operands(seed)
            sets.append((other.x, other.steps, other.shift, case.prepare(other)))
        xla, bf16_error = self._xla(case, given, expected) if timed else ({}, math.nan)
        found = []
        for config, future in variants:
            row = {**dataclasses.asdict(case), "kernel": "decode" if isinstance(config, DecodeConfig) else "prefill"}
            row["config"] = dataclasses.asdict(config)
            try:
                call = future.result()
                first = call(*sets[0])
                row["errors"] = [relative_error(first, expected[0]), relative_error(call(*sets[1]), expected[1])]
                row["same_bits"] = bool((first == call(*sets[0])).all())
            except FAILURES as error:
                yield row | {"failure": f"{type(error).__name__}: {error}"[:300]}
                continue
            row |= {"bf16_error": bf16_error, "xla": xla}
            if not row["same_bits"] or not max(row["errors"]) < BF16_ROUNDING:
                yield row | {"target": f"WRONG: errors {row['errors']}, same bits: {row['same_bits']}"}
                continue
            if timed:
                row["microseconds"], row["kernels"] = kernel_microseconds(call, sets)
                row |= self.peaks.compared(case, row["microseconds"], xla)
            found.append(row)
        counted = [row for row in found if not math.isnan(row.get("microseconds", 0.0))]
        last = min(counted, key=lambda row: row.get("microseconds", 0.0), default=None)
        yield from (row for row in found if row is not last)
        if last is not None:
            yield last | {"chosen": True} | verdict(case, last)

    def rotation(self, case: RotationCase) -> dict[str, Any]:
        """Returns the row of a rotation."""
        row: dict[str, Any] = {"kind": ROTATION, **dataclasses.asdict(case)}
        try:
            sets = [case.operands(seed) for seed in range(copies(BYTES_OF_BF16 * case.tokens * case.order))]
            call = jax.jit(case.kernel()).lower(*sets[0]).compile()
            found = case.differences(call, sets[0])
            row |= found._asdict() | {"target": "right" if found.right() else "WRONG"}
            row["microseconds"], row["kernels"] = kernel_microseconds(call, sets)
            row["microseconds_in_cache"] = kernel_microseconds(call, sets[:1])[0]  # as behind the kernel that made x
            row["xla"] = kernel_microseconds(jax.jit(case.xla()).lower(*sets[0]).compile(), sets)[0]
            row["rate"] = case.bytes_moved / row["microseconds"] / 1e3
            row["of_peak"] = row["rate"] / self.peaks.copy_rate()
        except FAILURES as error:
            row["failure"] = f"{type(error).__name__}: {error}"[:300]
        return row

    def outliers(self, case: OutlierCase) -> dict[str, Any]:
        """Returns the row of a product with outliers, microseconds and errors by the way in which they are added."""
        row: dict[str, Any] = {"kind": OUTLIERS, **dataclasses.asdict(case)}
        try:
            sets = [(case.operands(seed),) for seed in range(copies(float(case.outputs * case.inputs)))]
            expected = case.meaning(*sets[0])
            for name, way in case.ways().items():
                call = jax.jit(way).lower(*sets[0]).compile()
                times = kernel_microseconds(call, sets)
                row[name] = {"microseconds": times[0], "kernels": times[1]}
                row[name]["error"] = relative_error(call(*sets[0]), expected)
        except FAILURES as error:
            row["failure"] = f"{type(error).__name__}: {error}"[:300]
        return row

    def _xla(self, case: Any, given: list[Any], expected: list[Any]) -> tuple[dict[str, float], float]:
        """Returns microseconds of XLA's formulations, each compiled with the GPU to itself, and bfloat16's error."""
        times, bf16_error = {}, math.nan
        for name, (function, arguments) in case.xla().items():
            key = (name, case.tokens, case.outputs, case.inputs, None if name == "bfloat16" else case.groups)
            if key not in self._baselines or name == "bfloat16":
                sets = [arguments(given[0])]
                if key not in self._baselines:
                    call = jax.jit(function).lower(*sets[0]).compile()
                    width = {"bfloat16": 2.0, "int8 with scales": 1.0}.get(name, 0.5)
                    count = copies(width * case.outputs * case.inputs)
                    sets += [arguments(case.operands(seed)) for seed in range(1, count)]
                    self._baselines[key] = call, kernel_microseconds(call, sets)[0]
                if name == "bfloat16":
                    bf16_error = relative_error(self._baselines[key][0](*sets[0]), expected[0])
            times[name] = self._baselines[key][1]
        return times, bf16_error


if __name__ == "__main__":
    main()
