"""Predictions on paper against what was measured, within 20 %: from the logs that the figures were written to."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Final

import pytest

from jquant.budget import Way, predict
from jquant.commands.plan import run
from jquant.errors import RecipeError
from jquant.formats import tree_nbytes
from jquant.models import SHAPES, abstract_llama
from jquant.plan import Plan, plan
from jquant.recipe import load_recipe
from jquant.simulate import RATES, Simulation, simulate, token_seconds
from jquant.tables import simulation_table

LOGS: Final = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
EIGHT: Final = SHAPES["llama-3.1-8b"]
WITHIN: Final = 0.2


def log(name: str, **known: Any) -> list[dict[str, Any]]:
    """Return the lines of a log that have these entries."""
    rows = [json.loads(line) for line in (LOGS / name).read_text().splitlines()]
    return [row for row in rows if all(row.get(key) == value for key, value in known.items())]


def planned(recipe: str, layers: int = 32) -> Plan:
    config = dataclasses.replace(EIGHT, num_hidden_layers=layers)
    return plan(abstract_llama(config, "bfloat16"), load_recipe(recipe))


def on(devices: int, shape: str = "llama-3.1-8b") -> Simulation:
    figures = plan(abstract_llama(SHAPES[shape], "bfloat16"), load_recipe("gptq-w4g128"))
    table = 2 * SHAPES[shape].vocab_size * SHAPES[shape].hidden_size
    return simulate(figures, devices=devices, table_nbytes=table, kv_heads=8)


def test_gptq_of_eight_billion_weights_on_one_gpu() -> None:
    """The rates are of one block's parts; the run is the 32 blocks, its first one compiling."""
    blocks = [row["seconds"] for row in log("2026-11-22-h100-quantize-time.jsonl") if row.get("block", 0) > 0]
    found = on(1)
    assert found.calibration_seconds + found.solve_seconds == pytest.approx(32 / 31 * sum(blocks), rel=WITHIN)
    for row in log("2026-11-22-h100-quantize-time.jsonl", recipe="gptq-w4g128"):
        if "peak_gb" in row:
            device = predict(planned("gptq-w4g128", row["layers"]), Way("whole"), has_device=True).device
            assert device == pytest.approx(1e9 * row["peak_gb"], rel=WITHIN)


def test_host_memory_of_sixteen_gigabytes() -> None:
    row = log("2026-11-22-cpu-quantize-memory.jsonl")[-1]
    host = predict(planned("rtn-w4g128"), Way("blocks"), has_device=False).host
    assert host == pytest.approx(1e9 * row["peak_gb"], rel=WITHIN)
    assert row["peak_gb"] < 8


@pytest.mark.parametrize(("of", "run", "rows"), [("w4", 2, 1), ("kv16", 2, 16), ("bf16", 1, 1)])
def test_tokens_of_a_second(of: str, run: int, rows: int) -> None:
    """A step reads all weights but the table, and the caches; the memory is both, the table too."""
    row = log("2026-11-22-h100-runtime.jsonl", run=run, of=of, way="advance")[0]
    table = tree_nbytes(abstract_llama(EIGHT, "bfloat16").embed_tokens)
    held = 1e9 * (row["weights_gb"] + row["cache_gb"])
    assert rows / token_seconds(int(held) - table) == pytest.approx(row["decode"]["tok_s"], rel=WITHIN)
    assert held == pytest.approx(1e9 * row["decode"]["peak_gb"], rel=WITHIN)


@pytest.mark.parametrize(("of", "recipe"), [("W4A16", "rtn-w4g128"), ("W4A4", "quarot-w4a4")])
@pytest.mark.parametrize("devices", [1, 2])
def test_tokens_of_a_second_on_two_devices(of: str, recipe: str, devices: int) -> None:
    """One row behind 512 tokens; W4A4's rate of gathers is of this run, all other rates are of earlier ones."""
    (row,) = log("2026-11-23-h200x2-two-devices.jsonl", of=of, devices=devices, rows=1)
    table = tree_nbytes(abstract_llama(EIGHT, "bfloat16").embed_tokens)
    found = simulate(planned(recipe), devices=devices, table_nbytes=table, kv_heads=8, context=512)
    assert found.tokens_per_second == pytest.approx(row["tokens_per_second"], rel=WITHIN)


def test_eight_devices_calibrate_faster_and_solve_as_fast() -> None:
    rows = [on(count, "llama-3.1-405b") for count in (1, 8, 64)]
    assert [row.tokens_per_second > 0 for row in rows] == [False, True, True]  # 218 GB on one of 80
    assert [row.copies for row in rows] == [1, 1, 8]
    assert rows[0].calibration_seconds > 7 * rows[1].calibration_seconds
    assert rows[1].calibration_seconds == rows[2].calibration_seconds  # eight lanes
    assert len({row.solve_seconds for row in rows}) == len({row.host_seconds for row in rows}) == 1
    assert rows[0].device_nbytes > rows[2].device_nbytes
    table = simulation_table(rows)
    assert table.row_count == 3
    assert str(table.caption).count("\n") == len(RATES) - 1
    with pytest.raises(RecipeError, match="0 devices: give 1 at least"):
        on(0)


def test_known_shapes_are_planned_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    run("smollm2-135m", recipe="rtn-w8", devices=[1, 8])
    said = capsys.readouterr().out
    assert "on paper, by measured rates" in said
    assert "one block at a time, device" in said
