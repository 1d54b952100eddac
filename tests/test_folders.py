"""What several steps change on disk, stopped in the middle: nothing that a later run reads is half there."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from jquant.folders import remove_folder, write_text


def test_a_folder_half_removed_is_gone_and_swept_up_by_the_next_removal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "work"

    def fill() -> None:
        folder.mkdir()
        for name in ("arrays", "structure.json"):
            (folder / name).touch()

    def die(path: Path, **options: Any) -> None:
        if path.exists():
            (path / "arrays").unlink()
            raise KeyboardInterrupt

    fill()
    with monkeypatch.context() as patches:
        patches.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(folder)
    assert not folder.exists()
    fill()
    remove_folder(folder)
    remove_folder(folder)  # one that is not there
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_renamed_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "file").touch()

    def refuse(*paths: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "replace", refuse)
    remove_folder(tmp_path / "work")
    assert (tmp_path / "work" / "file").exists()


def test_two_processes_may_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second writes it while the first is between its two steps."""
    step, meanwhile = Path.replace, ["theirs"]

    def replace(self: Path, target: Path) -> Path:
        if meanwhile:
            write_text(target, meanwhile.pop())
        return step(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    write_text(tmp_path / "table.md", "ours")
    assert [file.name for file in tmp_path.iterdir()] == ["table.md"]
    assert (tmp_path / "table.md").read_text() == "ours"
