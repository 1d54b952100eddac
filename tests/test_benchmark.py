"""What `bench` gives where memory does not suffice, and what it refuses before it makes a model."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.console import Console

from eval import Latency, Phase, Workload
from jquant import benchmark
from jquant.benchmark import Shortage, bench
from jquant.errors import CheckpointError, DataError
from jquant.models import tiny_hf_config
from jquant.tables import benchmark_table

WORKLOADS = [Workload(1, prompt=8, tokens=0, repeats=1), Workload(2, prompt=8, tokens=0, repeats=1)]
FULL = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes."


@pytest.fixture
def config(tmp_path: Path) -> str:
    """Return the path of a config.json."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_hf_config("llama2")), encoding="utf-8")
    return str(path)


def timed(_: Any, workload: Workload, **__: Any) -> Latency:
    """Stand in for `measure_latency`, of a device that holds one row."""
    if workload.batch > 1:
        raise jax.errors.JaxRuntimeError(f"{FULL}\nBufferAssignment: 1 MiB")
    return Latency(workload, Phase((0.5,), 1.0, 8, 3), None, 2, 1, 3, "arrays")


def shown(rows: list[Any], workload: int, width: int = 200) -> str:
    """Return a table as text."""
    console = Console(width=width)
    with console.capture() as text:
        console.print(benchmark_table(rows, workload, "a card", width))
    return text.get()


def test_what_does_not_fit_is_said_to_and_the_rest_is_timed(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = benchmark.make_ready, []

    def make(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 1:
            raise jax.errors.JaxRuntimeError(FULL)
        return made(*given)

    monkeypatch.setattr(benchmark, "measure_latency", timed)
    monkeypatch.setattr(benchmark, "make_ready", make)
    rows = list(bench(config, ["rtn-w8"], WORKLOADS))
    whole, rounded = rows
    assert whole.latencies == tuple(Shortage(each, FULL) for each in WORKLOADS)
    assert whole.products == "-"
    assert isinstance(rounded.latencies[0], Latency)
    assert rounded.latencies[1] == Shortage(WORKLOADS[1], FULL)
    assert shown(rows, 0).count("too large") == 2  # the cell, and what it means
    assert "16.0" in shown(rows, 0)  # tokens a second of the row that fits, itself the base
    assert shown(rows, 1).count("too large") == 3
    narrow = shown(rows, 0, 60)  # a column for each model
    (line,) = (line for line in narrow.splitlines() if "prompt tokens/s" in line)
    assert line.replace("│", " ").split() == ["prompt", "tokens/s", "-", "16.0"]


def test_other_errors_of_the_device_are_errors(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Latency:
        raise jax.errors.JaxRuntimeError("INTERNAL: a kernel failed")

    monkeypatch.setattr(benchmark, "measure_latency", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a kernel failed"):
        list(bench(config, [], WORKLOADS))


def test_what_cannot_be_timed_is_refused_before_a_model_is_made(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(benchmark, "random_like")
    with pytest.raises(DataError, match="need 9999 positions, but the model's context is"):
        list(bench(config, [], [WORKLOADS[0], Workload(1, prompt=9998, tokens=0)]))
    with pytest.raises(CheckpointError, match=r"llama-9b is no shape and no file; give smollm2-135m, .*hub id"):
        list(bench("llama-9b", [], WORKLOADS))
