"""`--mesh` on the command line: the same text and figures as on one device, refusals in one line, and two processes."""

import json
import os
import socket
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


JOIN: Final = """
import jax, numpy
from jquant.errors import RecipeError
from jquant.processes import gather_from_all, leave
from jquant.sharding import join_processes
try:
    join_processes("slurm")
except RecipeError as error:
    print(error)
    leave(2)
print(jax.process_index(), jax.process_count(), gather_from_all(numpy.int32(jax.process_index() + 5)).tolist())
leave(0)
"""


def join_as(task: int | None, job: int) -> subprocess.Popen[str]:
    """Start a process with what Slurm tells a task of a step of two; outside a job if None."""
    step = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": 2}
    given = {} if task is None else step | {"SLURM_PROCID": task, "SLURM_LOCALID": task}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment = clean | {name: str(value) for name, value in given.items()} | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", JOIN], env=environment, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Return the path of a tiny Hugging Face folder."""
    return str(write_checkpoint(tmp_path / "source"))


def test_inspect_tells_what_each_device_has(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", source, "--mesh", "data=4,tensor=2") == 0
    shown = capsys.readouterr().out
    assert "each device has" in shown
    assert "outputs, of gathered inputs" in shown  # a float32 folder


def test_meshes_that_cannot_be_are_one_line(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", source, "--prompt", "a", "--mesh", "data=64") == 2
    assert "needs 64 devices, there are 2" in capsys.readouterr().err
    assert run("quantize", source, f"{source}-out", *SMALL, "--processes", "2") == 2
    assert "--processes and --process belong to --coordinator" in capsys.readouterr().err
    for coordinator, processes, process in (("localhost:1", 2, 2), ("localhost", 2, 0), ("localhost:1", None, None)):
        with pytest.raises(RecipeError, match="give host:port, how many"):
            join_processes(coordinator, processes, process)


@pytest.mark.slow
def test_tasks_of_a_slurm_step_find_each_other_by_its_environment() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 61440 + os.getpid() % 4096))  # where JAX lets a job of this number meet
        job = free.getsockname()[1] - 61440
    tasks = [join_as(task, job) for task in (0, 1, None)]
    said = [task.communicate(timeout=120)[0].splitlines()[-1] for task in tasks]  # gloo has a line too
    assert [task.returncode for task in tasks] == [0, 0, 2], said
    assert said[:2] == ["0 2 [5, 6]", "1 2 [5, 6]"]
    assert "cannot join the other processes by slurm" in said[2]
    assert "elsewhere give host:port" in said[2]


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
    assert set(logits["apart_in_two_processes"]) == {"2x2", "1x4", "4x1"}
    assert any("4 KV heads over 8 devices" in note for note in logits["whole"])
    together = logits["apart_in_two_processes"].values()
    assert max(*logits["apart"].values(), *together) <= 2e-5 * logits["largest_logit"]
