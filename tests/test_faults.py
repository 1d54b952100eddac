"""What may befall a run: kills, full disks, locked folders, damage, a rival, a jumping clock; never half a result."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from jquant.checkpoint import load_model, recorded_digest
from jquant.errors import CheckpointError
from jquant.pipeline import quantize
from tests import faulty_run
from tests.checkpoints import write_checkpoint

ROOT: Final = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder that another user may enter, with a model of three blocks in it."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    write_checkpoint(place / "source", num_hidden_layers=3)
    for file in (place / "source").iterdir():
        file.chmod(0o644)
    yield place
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where scenarios share their compiled programs."""
    return tmp_path_factory.mktemp("cache")


def play(folder: Path, scenario: str, cache: Path) -> dict[str, Any]:
    """Run a scenario in a process of its own, which forks."""
    command = [sys.executable, "-m", "tests.faulty_run", str(folder), scenario, str(cache)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_gives_the_same_bits(folder: Path, cache: Path) -> None:
    """On one device and on two by turns."""
    found = play(folder, "kills", cache)
    assert found["killed"] == faulty_run.KILLS
    assert len(set(found["blocks"])) > 1  # it was stopped at different places
    assert (found["digests"], found["status"], found["left"]) == (1, 0, [])
    assert recorded_digest(folder / "out")
    load_model(folder / "out")


@pytest.mark.slow
def test_a_run_killed_within_each_pass_that_measures_gives_the_same_bits(folder: Path, cache: Path) -> None:
    found = play(folder, "measured", cache)
    assert found["within"] == dict.fromkeys(faulty_run.MEASURES, faulty_run.KILLS_WITHIN)
    assert (found["digests"], found["status"], found["left"]) == (1, 0, [])
    load_model(folder / "out")


@pytest.mark.slow
def test_two_processes_of_which_some_are_killed_end_and_give_the_same_bits(folder: Path, cache: Path) -> None:
    found = play(folder, "pairs", cache)
    assert (found["killed"], found["hung"]) == (faulty_run.PAIRS, 0), found
    assert set(found["answers"]) <= {*faulty_run.SAID, "ended well"}, found["answers"]
    assert (found["digests"], found["status"], found["left"]) == (1, 0, [])


@pytest.mark.slow
def test_a_full_disk_and_a_locked_folder_are_named_and_cost_nothing(folder: Path, cache: Path) -> None:
    found = play(folder, "disks", cache)
    for limit in ("16384", "65536"):
        assert found["words"][limit].startswith("2: cannot write"), found["words"]
    assert found["words"]["read-only"].startswith("2: cannot write to"), found["words"]
    assert (found["status"], found["same"]) == (0, True)


@pytest.mark.slow
def test_a_jumping_clock_and_a_rival_change_nothing(folder: Path, cache: Path) -> None:
    found = play(folder, "clocks", cache)
    assert found["cut"] in (2, -signal.SIGKILL), found
    assert found["future"] > 0
    assert found["misled"] in (0, 2), found
    assert ("cannot write" in found["said"]) == (found["misled"] == 2)
    assert (found["status"], found["same"], found["rival"], found["after"]) == (0, True, 2, True), found
    assert "another process is working on" in found["words"]


@pytest.mark.slow
def test_an_interrupted_export_leaves_no_half_of_it(folder: Path, cache: Path) -> None:
    found = play(folder, "exports", cache)
    assert found["killed"] > 0
    assert found["halves"] == 0


class Stop(KeyboardInterrupt):
    """Ctrl-C."""


@pytest.mark.slow
def test_a_damaged_block_is_refused_by_name_and_solved_again_when_it_is_deleted(folder: Path) -> None:
    def stop(progress: Any) -> None:
        if progress.block is not None and progress.block.index == 1:
            raise Stop

    whole = quantize(folder / "source", folder / "whole", faulty_run.recipe())
    assert len(whole.blocks) == 3
    with pytest.raises(Stop):
        faulty_run.run(folder, on_progress=stop)
    block = folder / "out.partial" / "block-001"
    largest = max(
        (path for path in (block / "arrays").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"block-001 is damaged.*delete it to solve this block again"):
        faulty_run.run(folder)
    assert not (folder / "out").exists()
    shutil.rmtree(block)
    faulty_run.run(folder)
    assert recorded_digest(folder / "out") == recorded_digest(folder / "whole")
