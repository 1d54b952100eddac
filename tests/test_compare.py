"""Comparisons: rows and tables, what is kept and used again, shared calibration windows, and what is refused."""

import contextlib
import csv
import dataclasses
import gzip
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jquant.compare import BASELINE, Evaluation, compare, expand, on_source_inputs, share_calibration
from jquant.comparison import claim
from jquant.data import PYTHON_DOCS
from jquant.errors import CalibrationError, CheckpointError, DataError, FormatError, RecipeError
from jquant.progress import Progress
from jquant.recipe import Recipe, load_recipe, presets
from tests.checkpoints import write_checkpoint

RULE = "passes[0].sequential.passes[0].quantize_weights.rules[0]"
EVALUATION = Evaluation(windows=2, length=32)


def rtn(*changes: str) -> Recipe:
    return load_recipe("rtn-w4g64", [f"{RULE}.quantizer.rtn.format.group_size=32", *changes])


def gptq(windows: Path) -> Recipe:
    recipe = load_recipe("gptq-w4g64", [f"{RULE}.quantizer.gptq.format.group_size=32"])
    return share_calibration(recipe, file=windows, samples=2, length=16)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source")


@pytest.fixture
def windows(tmp_path: Path) -> Path:
    """Return a file of three windows of twenty tokens."""
    np.save(tmp_path / "windows.npy", np.random.default_rng(0).integers(32, 127, (3, 20)))
    return tmp_path / "windows.npy"


def stages(seen: list[Progress]) -> list[str]:
    return [one.stage for one in seen if " of " in one.stage]


@pytest.mark.slow
def test_rows_tables_and_what_is_used_again(source: Path, windows: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    out = tmp_path / "out"
    rows = compare(source, out, [rtn(), gptq(windows)], EVALUATION, on_progress=seen.append)
    assert [row.name for row in rows] == [BASELINE, "rtn-w4g64", "gptq-w4g64"]
    assert [row.bits_per_weight for row in rows] == [32.0, *[pytest.approx(4.625, abs=0.02)] * 2]
    assert rows[0].nbytes > rows[1].nbytes == rows[2].nbytes
    assert rows[0].seconds == 0 < rows[2].seconds
    assert stages(seen) == ["full precision (1 of 3)", "rtn-w4g64 (2 of 3)", "gptq-w4g64 (3 of 3)"]
    assert not list((out / "work").iterdir())

    table = list(csv.reader((out / "table.csv").read_text().splitlines()))
    assert [float(line[5]) for line in table[1:]] == [row.columns()["perplexity"] for row in rows]
    assert [line[0] for line in table] == ["recipe", *(row.name for row in rows)]
    assert json.loads((out / "table.json").read_text())["rows"][2]["nbytes"] == rows[2].nbytes
    lines = (out / "table.md").read_text().splitlines()
    assert lines[0] == "| recipe | bits per weight | bits per KV value | bytes | quantize seconds | perplexity |"
    assert lines[3].startswith(f"| rtn-w4g64 | {rows[1].bits_per_weight:.3f} | 32.000 | {rows[1].nbytes:,} | ")
    assert "2 windows of 32 tokens of python-docs" in lines[-1]

    seen.clear()
    again = compare(source, out, [gptq(windows), rtn("name=other")], EVALUATION, on_progress=seen.append)
    assert again[:2] == (rows[0], rows[2])
    assert again[2].perplexities == rows[1].perplexities
    assert stages(seen) == ["other (3 of 3)"]

    np.save(windows, np.load(windows)[::-1])
    seen.clear()
    compare(source, out, [gptq(windows)], EVALUATION, on_progress=seen.append)
    assert stages(seen) == ["gptq-w4g64 (2 of 2)"]

    made = json.loads((out / "table.json").read_text())["rows"][1]
    assert made["provenance"]["recipe"].startswith("name: gptq-w4g64\n")
    assert made["provenance"]["calibration"]["source"] == str(windows)
    assert made["provenance"]["texts"][PYTHON_DOCS]
    assert [len(errors) for errors in made["errors"].values()] == [2] * 7


@pytest.mark.slow
def test_a_row_that_another_process_makes_is_waited_for(source: Path, tmp_path: Path) -> None:
    """It holds the lock from before our first row until its own is written, while ours goes on."""
    theirs = compare(source, tmp_path / "theirs", [rtn()], EVALUATION)
    (made,) = (tmp_path / "theirs" / "rows").glob("rtn-*")
    seen: list[Progress] = []
    with contextlib.ExitStack() as lock:

        def write() -> None:
            shutil.copy(made, tmp_path / "out" / "rows")
            lock.close()

        def begin(progress: Progress) -> None:
            seen.append(progress)
            if "(1 of 2)" in progress.stage:
                assert lock.enter_context(claim(tmp_path / "out" / "work" / f"{made.stem}.lock", wait=False))
                threading.Timer(1.0, write).start()

        ours = compare(source, tmp_path / "out", [rtn()], EVALUATION, on_progress=begin)
    assert stages(seen) == ["full precision (1 of 2)"]
    assert ours == theirs
    assert not list((tmp_path / "out" / "work").iterdir())


@pytest.mark.slow
def test_recipes_can_share_what_is_collected_on_the_source(source: Path, windows: Path, tmp_path: Path) -> None:
    """Rows of both kinds are kept apart; a recipe without Hessians stays what it was."""
    recipes = [gptq(windows), dataclasses.replace(gptq(windows), name="other", seed=1)]
    shared = compare(source, tmp_path / "out", recipes, EVALUATION, share_hessians=True)
    assert shared[1].perplexities == shared[2].perplexities
    assert not (tmp_path / "out" / "statistics").exists()
    own = compare(source, tmp_path / "out", recipes[:1], EVALUATION)
    assert own[1].perplexities != shared[1].perplexities
    assert on_source_inputs(rtn()) == rtn()


@pytest.mark.slow
def test_what_a_kill_behind_a_row_leaves_is_no_damaged_checkpoint(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, remove = tmp_path / "out", shutil.rmtree

    def die(folder: Path, **options: Any) -> None:
        if Path(folder).parent.name != "work" or not (Path(folder) / "structure.json").exists():
            remove(folder, **options)
            return
        remove(Path(folder) / "arrays")
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            compare(source, out, [rtn()], EVALUATION)
    (row,) = (out / "rows").glob("rtn-*")
    expected = row.read_text()
    assert list((out / "work").iterdir())
    compare(source, out, [rtn()], EVALUATION)  # the row is there
    assert not list((out / "work").iterdir())
    with monkeypatch.context() as patches:
        patches.setattr(shutil, "rmtree", die)
        row.unlink()  # to be made again
        with pytest.raises(KeyboardInterrupt):
            compare(source, out, [rtn()], EVALUATION)
        row.unlink()
    compare(source, out, [rtn()], EVALUATION)
    assert json.loads(row.read_text())["perplexities"] == json.loads(expected)["perplexities"]
    assert not list((out / "work").iterdir())


def test_failure_names_the_recipe_and_keeps_finished_rows(source: Path, windows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def fail(progress: Progress) -> None:
        if (progress.stage, progress.done) == ("quantizing", 2):
            raise CalibrationError("not finite")

    with pytest.raises(CalibrationError, match=r"gptq-w4g64: not finite\n2 finished blocks are kept"):
        compare(source, out, [gptq(windows)], EVALUATION, on_progress=fail)
    assert len(list((out / "rows").iterdir())) == 1
    assert BASELINE in (out / "table.md").read_text()
    next((out / "rows").iterdir()).write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot be read .*delete it and run again"):
        compare(source, out, [rtn()], EVALUATION)


def test_what_cannot_work_is_refused_before_any_work(source: Path, windows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match=r"several rows would be called rtn-w4g64; give each recipe a `name`"):
        compare(source, out, [rtn(), rtn("seed=1")], EVALUATION)
    with pytest.raises(FormatError, match=r"bad: .*does not divide"):
        compare(source, out, [rtn(), rtn("name=bad", f"{RULE}.quantizer.rtn.format.group_size=48")], EVALUATION)
    np.save(windows, np.load(windows)[:1])
    with pytest.raises(DataError, match=r"gptq-w4g64: .*has 1 windows of 20 tokens, but 2 of 16 are asked for"):
        compare(source, out, [rtn(), gptq(windows)], EVALUATION)
    assert not out.exists()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write to"):
        compare(source, tmp_path / "file", [rtn()], EVALUATION)


def test_the_published_tables_are_presets() -> None:
    names = expand(["paper-tables", "kv4"])
    assert set(names) <= set(presets())
    assert len(set(names)) == len(names) == 29
    assert names[-1] == "kv4"


def test_calibration_is_shared_by_those_that_calibrate(windows: Path) -> None:
    assert share_calibration(rtn(), file=windows, samples=2) == rtn()
    shared = gptq(windows).calibration
    assert shared is not None
    assert (shared.dataset, shared.samples, shared.length) == (str(windows), 2, 16)
    with pytest.raises(DataError, match=r"text\.txt: windows of tokens are a \.npy file"):
        share_calibration(rtn(), file=Path("text.txt"))


def test_tasks_are_columns_and_a_stopped_comparison_repeats_nothing(source: Path, tmp_path: Path) -> None:
    """Stopped at the last answer of the second row: its checkpoint, its perplexities and the answers are kept."""
    passages = [{"passage": "A bee flies.", "question": f"is {index} odd", "label": index % 2} for index in range(4)]
    (tmp_path / "boolq_validation.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, passages)).encode()))
    text = tmp_path / "bees.txt"
    text.write_text("A bee flies over a flower.\n" * 30)
    evaluation = Evaluation((PYTHON_DOCS, str(text)), windows=2, length=32, tasks=("boolq",), limit=3)
    seen: list[Progress] = []

    def stop(progress: Progress) -> None:
        seen.append(progress)
        if (stages(seen), progress.done) == (["full precision (1 of 2)", "rtn-w4g64 (2 of 2)"], 6):
            raise KeyboardInterrupt

    out, folder = tmp_path / "out", tmp_path
    with pytest.raises(KeyboardInterrupt):
        compare(source, out, [rtn()], evaluation, folder=folder, on_progress=stop)
    seen.clear()
    rows = compare(source, out, [rtn()], evaluation, folder=folder, on_progress=seen.append)
    assert stages(seen) == ["rtn-w4g64 (2 of 2)"]
    assert not [one for one in seen if one.total]  # no window, no answer again
    assert not list((out / "work").iterdir())
    titles = [f"perplexity {PYTHON_DOCS}", f"perplexity {text}", "boolq acc"]
    assert [list(row.columns()) for row in rows] == [titles] * 2
    assert {score.documents for row in rows for score in row.scores} == {3}

    table = list(csv.reader((out / "table.csv").read_text().splitlines()))
    assert table[0][-3:] == titles
    assert [float(line[-1]) for line in table[1:]] == [row.scores[0].value for row in rows]
    assert "| boolq acc |" in (out / "table.md").read_text()
    assert compare(source, out, [rtn()], evaluation, folder=folder) == rows
    with pytest.raises(DataError, match="'bolq' is no task"):
        compare(source, tmp_path / "new", [rtn()], dataclasses.replace(evaluation, tasks=("bolq",)), folder=folder)
    assert not (tmp_path / "new").exists()


def test_a_target_is_part_of_the_evaluation() -> None:
    plain = Evaluation(windows=2, length=16)
    assert plain.describe().endswith("python-docs, evaluation split")
    assert dataclasses.replace(plain, target="h100").describe().endswith("evaluation split, kernels of h100")
