"""The block store: a run that is stopped, however, goes on to the same bits; another run's store is refused."""

import contextlib
import dataclasses
import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from jquant.blocks import QuantizeWeights, Rule
from jquant.calibration import BlockStore, quantize_blocks
from jquant.checkpoint import ARRAYS, digest
from jquant.errors import CheckpointError
from jquant.formats import SpqrFormat
from jquant.models import Block, get, random_model, tiny_config
from jquant.quantizers import Spqr
from jquant.report import BlockReport, LinearReport, Report
from tests.calibration import killed_run

FINGERPRINT = killed_run.FINGERPRINT
BLOCKS = 6
REPORT = BlockReport(3, (LinearReport("layers.3.mlp.up_proj", "UniformTensor", 4.5, 0.125, None, 0.1, 0.01),), 1.5)
REPORT = dataclasses.replace(REPORT, phases={"compile": 0.5, "solve mlp_input": 0.75})


@contextlib.contextmanager
def opened(path: Path, fingerprint: dict[str, str] = FINGERPRINT) -> Iterator[BlockStore]:
    store = BlockStore.open(path, fingerprint)
    with store.lock:
        yield store


@pytest.fixture(scope="module")
def block() -> Block:
    return killed_run.model().layers[0]


@pytest.fixture(scope="module")
def whole() -> tuple[str, Report]:
    """Return the digest and report of a run that nobody stopped and that kept nothing."""
    model, report = killed_run.run(None)
    return digest(model), report


def figures(report: Report) -> list[LinearReport]:
    return list(report.linears())


def test_blocks_come_back_bit_for_bit_with_their_reports(block: Block, tmp_path: Path) -> None:
    with opened(tmp_path / "deep" / "store") as store:
        assert store.get(3) is None
        store.put(3, block, REPORT)
        assert store.finished() == 1
    with opened(tmp_path / "deep" / "store") as store:
        back, report = store.get(3)
        assert store.get(2) is None
    assert report == REPORT
    assert digest(back) == digest(block)


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    """The other one is a few lines that take the lock and wait for their input to end."""
    with opened(tmp_path):
        pass
    hold = (
        "import fcntl, sys; lock = open(sys.argv[1]); fcntl.flock(lock, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    command = [sys.executable, "-S", "-c", hold, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(CheckpointError, match=f"another process is working on {tmp_path}; wait for it, or give"):
            BlockStore.open(tmp_path, FINGERPRINT)
        other.communicate(b"\n")
    with opened(tmp_path) as store, pytest.raises(CheckpointError, match="another process is working on"):
        BlockStore.open(store.path, FINGERPRINT)  # nor twice in one process


def test_another_runs_store_is_refused_by_what_differs(block: Block, tmp_path: Path) -> None:
    with opened(tmp_path, {"model": "a", "recipe": "b", "tokens": "c"}) as store:
        store.put(0, block, REPORT)
    other = {"model": "a", "recipe": "x", "jax": "0.11.2"}
    with pytest.raises(CheckpointError, match=r"holds blocks of another run: jax, recipe, tokens differ\. Delete"):
        BlockStore.open(tmp_path, other)
    with opened(tmp_path, {"tokens": "c", "recipe": "b", "model": "a"}) as store:  # refused, not harmed; nor locked
        assert store.finished() == 1


def test_damaged_stores_say_what_to_delete(block: Block, tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.put(0, block, REPORT)
        store.put(1, block, REPORT)
        (tmp_path / "block-000" / "report.json").write_text('{"index": 0, ')
        largest = max((tmp_path / "block-001" / ARRAYS).rglob("*"), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1])
        for index in (0, 1):
            with pytest.raises(
                CheckpointError, match=f"block-00{index} is damaged .*delete it to solve this block again"
            ):
                store.get(index)
    (tmp_path / "fingerprint.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"fingerprint.json is damaged .*delete .* to start anew"):
        BlockStore.open(tmp_path, FINGERPRINT)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in ("file", "file/store"):
        with pytest.raises(
            CheckpointError, match=f"cannot write to .*{place}: .*Choose a folder that you may write to"
        ):
            BlockStore.open(tmp_path / place, FINGERPRINT)


def test_a_block_that_cannot_be_written_costs_none_before_it(block: Block, tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.put(0, block, REPORT)
        before = sorted(path.name for path in tmp_path.iterdir())
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # no file may grow beyond it: not even the report
        try:
            with pytest.raises(
                CheckpointError, match=r"cannot write .*block-001: .*free space or choose another folder"
            ):
                store.put(1, block, REPORT)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        assert digest(store.get(0)[0]) == digest(block)


class Stop(Exception):
    """What stops a run at a block."""


@pytest.mark.parametrize("stop", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_stopped_run_goes_on_to_the_same_bits(whole: tuple[str, Report], tmp_path: Path, stop: int) -> None:
    def interrupt(report: BlockReport) -> None:
        if report.index == stop:
            raise Stop

    with opened(tmp_path) as store, pytest.raises(Stop):
        killed_run.run(store, interrupt)
    with opened(tmp_path) as store:
        assert store.finished() == stop + 1
        seen: list[BlockReport] = []
        model, report = killed_run.run(store, seen.append)
        assert store.finished() == BLOCKS
    assert digest(model) == whole[0]
    assert figures(report) == figures(whole[1])
    assert [one.index for one in seen] == list(range(BLOCKS))


@pytest.mark.slow
def test_blocks_whose_lists_of_outliers_were_cut_go_on_to_the_same_bits(tmp_path: Path) -> None:
    """SpQR's lists lose their empty room when a block is finished: the next block must not notice."""
    model = random_model(dataclasses.replace(tiny_config(), num_hidden_layers=3), jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, model.config.vocab_size)
    spqr = QuantizeWeights((Rule(".*down_proj", Spqr(SpqrFormat(bits=3, group_size=16), outlier_threshold=0.25)),))

    def run(store: BlockStore | None, blocks: int = 3) -> str:
        def interrupt(report: BlockReport) -> None:
            if report.index + 1 == blocks < 3:
                raise Stop

        found, _ = quantize_blocks(model, tokens, [spqr], key=jax.random.key(2), store=store, on_block=interrupt)
        rooms = {get(found, f"layers.{index}.mlp.down_proj").kernel.inner.outliers.rows.shape for index in range(3)}
        assert len(rooms) > 1  # else nothing would be shown
        return digest(found)

    with opened(tmp_path) as store, pytest.raises(Stop):
        run(store, blocks=2)
    with opened(tmp_path) as store:
        assert run(store) == run(None)


def test_a_finished_store_solves_nothing_again(whole: tuple[str, Report], tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        model, report = killed_run.run(store)
        times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        again, same = killed_run.run(store)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    assert digest(model) == digest(again) == whole[0]
    assert figures(same) == figures(report)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(whole: tuple[str, Report], tmp_path: Path) -> None:
    """SIGKILL twice over, each as soon as one more block is in the store, whatever goes on at that moment."""
    for _ in range(2):
        with opened(tmp_path) as store:
            finished = store.finished()
        awaited = tmp_path / f"block-{finished:03d}"
        command = [sys.executable, killed_run.__file__, str(tmp_path), str(finished + 1)]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            while not awaited.exists() and process.poll() is None:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors.decode()
        with opened(tmp_path) as store:
            assert finished < store.finished() <= finished + 2
    with opened(tmp_path) as store:
        model, report = killed_run.run(store)
    assert digest(model) == whole[0]
    assert figures(report) == figures(whole[1])


def test_keys_differ_from_block_to_block() -> None:
    """Were they one key, equal blocks would get equal noise, and a resumed run would still be the same."""
    model = killed_run.model()
    model = model.replace(layers=(model.layers[0],) * 2)
    passes = (dataclasses.replace(killed_run.PASSES[0], rules=killed_run.PASSES[0].rules[1:]),)
    quantized, _ = killed_run.quantize_blocks(model, None, passes, key=jax.random.key(2))
    first, second = (np.asarray(layer.mlp.up_proj.kernel.codes) for layer in quantized.layers)
    assert (first != second).mean() > 0.05


def test_reports_survive_json() -> None:
    report = Report((REPORT,), (("recipe", "x"),))
    assert json.loads(report.to_json())["blocks"][0]["linears"][0]["path"] == "layers.3.mlp.up_proj"
