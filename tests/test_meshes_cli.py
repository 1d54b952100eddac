"""`--mesh` on the command line: the same text and figures as on one device, refusals in one line, and two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from jquant.errors import RecipeError
from jquant.sharding import join_processes
from tests.checkpoints import write_checkpoint
from tests.test_cli import SMALL, run

ROOT: Final = Path(__file__).resolve().parent.parent


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Return the path of a tiny Hugging Face folder."""
    return str(write_checkpoint(tmp_path / "source"))


def test_inspect_tells_what_each_device_has(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", source, "--mesh", "data=4,tensor=2") == 0
    shown = capsys.readouterr().out
    assert "each device has" in shown
    assert "inputs, products summed" in shown


def test_meshes_that_cannot_be_are_one_line(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", source, "--prompt", "a", "--mesh", "data=64") == 2
    assert "needs 64 devices, there are 2" in capsys.readouterr().err
    assert run("quantize", source, f"{source}-out", *SMALL, "--processes", "2") == 2
    assert "--processes and --process belong to --coordinator" in capsys.readouterr().err
    for coordinator, processes, process in (("localhost:1", 2, 2), ("localhost", 2, 0), ("localhost:1", None, None)):
        with pytest.raises(RecipeError, match="give host:port, how many"):
            join_processes(coordinator, processes, process)


@pytest.mark.slow
def test_commands_over_two_devices(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert run("quantize", source, out, *SMALL, "--mesh", "data=2") == 0
    assert "mesh: data 2 x tensor 1: 2 x cpu" in capsys.readouterr().err
    texts, figures = [], []
    for mesh in ((), ("--mesh", "data=2"), ("--mesh", "tensor=2")):
        assert run("generate", out, "--prompt", "ab", "--max-tokens", "4", *mesh) == 0
        texts.append(capsys.readouterr().out)
        options = (
            "--perplexity",
            "python-docs",
            "--windows",
            "2",
            "--length",
            "32",
            "--json",
            str(tmp_path / "e.json"),
        )
        assert run("eval", out, *options, *mesh) == 0
        figures.append(json.loads((tmp_path / "e.json").read_text())["perplexity"]["value"])
        capsys.readouterr()
    assert texts[0] == texts[1] == texts[2]
    assert figures[1:] == pytest.approx(figures[:1] * 2, rel=1e-6)  # sums over devices are taken in another order
    assert run("bench", out, "--prompt", "8", "--tokens", "4", "--repeats", "1", "--mesh", "tensor=2") == 0


@pytest.mark.slow
def test_codes_are_those_of_one_device_on_eight_after_a_stop_and_in_two_processes() -> None:
    """Runs `benchmarks/mesh_parity.py`, which has eight devices of its own."""
    command = [sys.executable, str(ROOT / "benchmarks" / "mesh_parity.py"), "--recipes", "gptq", "--counts", "1", "8"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    codes, logits = (json.loads(line) for line in found.stdout.splitlines())
    assert set(codes["sha256"]) == {"1 devices", "8 devices", "stopped on 8 after 1, went on with 2", "two processes"}
    assert len(set(codes["sha256"].values())) == 1
    assert set(logits["apart"]) == {"2x4", "4x2", "1x8", "8x1"}
