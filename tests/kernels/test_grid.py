"""The benchmark's grid: rows of plain products on the CPU, what is timed once, and what a second run leaves out."""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import bench, grid, measure, reference, tuned
from pallas_kernels.cases import KINDS, Case
from pallas_kernels.configs import Kind
from pallas_kernels.decode_config import DecodeConfig

RIGHT, SLOWER, WRONG, FAILING = (DecodeConfig(stages=stages) for stages in (1, 2, 3, 4))
TOKENS = (1, 3, 300)  # the last are more than the rows that are checked


class PlainCase(Case):
    """Products by XLA in place of kernels, which the CPU has not."""

    def prepare(self, given: Any) -> Any:
        return reference.dense_weight(given.codes, given.scales, given.zeros)

    def kernel(self, config: Any) -> Any:
        def product(x: jax.Array, steps: jax.Array, shift: jax.Array, weight: jax.Array) -> jax.Array:
            if config == FAILING:
                raise ValueError("no such kernel")
            values = (x.astype(jnp.float32) - shift[:, None]) * steps[:, None]
            found = jnp.dot(values, weight.T, precision=jax.lax.Precision.HIGHEST)
            return (found * (1.1 if config == WRONG else 1.0)).astype(jnp.bfloat16)

        return product


class NoPeaks(measure.Peaks):
    def compared(self, case: Any, microseconds: float, xla: dict[str, float]) -> dict[str, float]:
        return {}


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gives each call the microseconds of its place, from 10 on, and keeps how many calls a session had."""
    found: list[int] = []

    def times(calls: Sequence[measure.Timed]) -> list[tuple[float, int]]:
        for call, sets in calls:
            jax.block_until_ready([call(*each) for each in sets])
        found.append(len(calls))
        return [(10.0 + place, 1) for place in range(len(calls))]

    monkeypatch.setattr(grid, "each_microseconds", times)
    return found


def rows_of(kinds: Sequence[Kind], tried: Sequence[Any]) -> list[dict[str, Any]]:
    products = [(PlainCase(kind, TOKENS[-1], 64, 256, 2 if kind == "w4a16" else 1), TOKENS) for kind in kinds]
    of_case = grid.rows(products, lambda case: tried, lambda case: tuple(case.xla()), NoPeaks(print), math.inf)
    return [row for _, row in of_case]


def test_every_product_has_a_right_row_and_a_shape_times_xla_once(sessions: list[int]) -> None:
    rows = rows_of(KINDS, [RIGHT])
    assert [(row["kind"], row["tokens"]) for row in rows] == [(kind, tokens) for kind in KINDS for tokens in TOKENS]
    for row in rows:
        assert row["chosen"]
        assert row["same_bits"]
        assert max(row["errors"]) < 2.0**-8
        assert row["bf16_error"] < 2.0**-7
    # bfloat16 and int4 or dequantized; int8 beside bfloat16's times; nothing: beside three kernels of each kind
    assert sessions == [3 + 3 + 3, 3 + 3, 3]
    assert [row["xla"]["bfloat16"] for row in rows] == 3 * [row["xla"]["bfloat16"] for row in rows[:3]]
    assert [row["xla"]["int8 with scales"] for row in rows[3:6]] == [row["xla"]["int8 with scales"] for row in rows[6:]]


def test_wrong_and_failing_configurations_have_no_time_and_the_fastest_comes_last(sessions: list[int]) -> None:
    rows = rows_of(("w8a8",), [FAILING, WRONG, RIGHT, SLOWER])
    for first in range(0, len(rows), 4):
        failing, wrong, slower, chosen = rows[first : first + 4]
        assert "no such kernel" in failing["failure"]
        assert wrong["target"].startswith("WRONG")
        assert "microseconds" not in failing.keys() | wrong.keys()
        assert chosen["chosen"]
        assert chosen["microseconds"] < slower["microseconds"]
        assert chosen["config"]["stages"] == RIGHT.stages
    assert len(rows) == 4 * len(TOKENS)


def test_a_second_run_leaves_out_what_the_first_has_timed(tmp_path: Path) -> None:
    rows = [
        {"device": "a GPU"},
        {"kind": "w4a8", "tokens": 1, "outputs": 8192, "inputs": 8192, "chosen": True, "microseconds": 13.0},
        {"kind": "w4a8", "tokens": 8192, "outputs": 8192, "inputs": 8192, "chosen": True, "microseconds": 600.0},
        {"kind": "w4a8", "tokens": 16, "outputs": 8192, "inputs": 8192, "microseconds": 14.0},
        {"kind": "spqr3", "tokens": 1, "outputs": 8192, "inputs": 8192, "chosen": True, "microseconds": 20.0},
        {"missing": []},
    ]
    path = tmp_path / "first.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = argparse.Namespace(kinds=["w4a8", "spqr3"], tokens=None, after=[path])
    ((case, tokens),) = bench._weights(arguments, 8192, 8192)
    assert (case.kind, case.tokens, tokens) == ("w4a8", 2048, (8, 16, 64, 256, 2048))
    assert [case.kind for case, _ in bench._weights(arguments, 4096, 4096)] == ["spqr3", "w4a8"]


def test_processes_have_the_seconds_that_are_left_when_they_begin() -> None:
    program = "import sys, time; time.sleep(0.2); print(sys.argv[-1])"
    commands = (grid.PROCESSES + 1) * [[sys.executable, "-c", program]]
    seconds = [float(line) for line in grid.lines_of(commands, time.monotonic() + 60)]
    assert len(seconds) == len(commands)
    assert max(seconds) <= 60
    assert min(seconds) < max(seconds) - 0.2
    assert list(grid.lines_of(commands, time.monotonic())) == []


def test_a_process_that_dies_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", "import os; print('row', flush=True); os.abort()"]
    assert list(grid.lines_of([command], time.monotonic() + 60)) == ["row\n"]
    assert "exit status -6" in capfd.readouterr().err


def test_calls_that_end_in_other_kernels_are_not_counted() -> None:
    part, kernel = ("part", 1.0), ("kernel", 2.0)
    rounds = (1 + measure.ROUNDS) * 2
    assert measure.parted([part, *[kernel] * rounds, part], 1) == [[2.0] * rounds]
    assert measure.parted([part, *[kernel] * rounds], 1) == [[]]
    assert measure.parted([], 2) == [[], []]
    assert measure.median_of_calls([2.0] * rounds, 2) == (2.0, 1)
    assert measure.median_of_calls([2.0] * (rounds + 1), 2) is None
    assert measure.median_of_calls([], 2) is None


def test_what_gains_over_the_rule_becomes_a_row_of_the_table() -> None:
    case = Case("w4a8", 64, 4096, 5120, 1)  # in no table
    present, other = case.config(), DecodeConfig(depth=64, stages=1)

    def row(config: Any, microseconds: float, **more: Any) -> dict[str, Any]:
        about = {**dataclasses.asdict(case), "kernel": "decode", "config": dataclasses.asdict(config)}
        return about | {"microseconds": microseconds} | more

    for slower, count in ((1.02, 0), (1.05, 1)):
        table = tuned.Tuned()
        table.add(case, row(present, slower))
        table.add(case, row(other, 1.0, chosen=True))
        assert len(table.rows) == count
    ((_, _, _, least), found), *_ = table.rows.items()
    assert (least, found.most, found.config) == (17, 64, other)

    table = tuned.Tuned()
    table.add(case, row(present, 1.0, chosen=True))
    assert not table.rows
    known = dataclasses.replace(case, inputs=4096)
    table.add(known, row(known.config(), 1.0, chosen=True) | {"inputs": 4096})
    assert len(table.rows) == 1
