"""One entry for every kind of checkpoint: a Hugging Face folder, a GGUF file, or the id of a model on the hub."""

import re
from pathlib import Path
from typing import Final

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from convert.base import Source
from convert.folder import open_folder
from convert.gguf import open_gguf
from jquant.errors import ConversionError

_HUB_ID: Final = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # owner/name
_WANTED: Final = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*")  # no pickled weights


def open_source(path_or_id: str | Path) -> Source:
    """Opens a checkpoint and reads its headers, no tensor.

    Args:
      path_or_id: a folder with safetensors, a .gguf file, or a hub id such as `Qwen/Qwen3-0.6B`, which is downloaded.

    Returns:
      The opened checkpoint.

    Raises:
      ConversionError: there is no such checkpoint, or its files are missing, damaged or pickled.
    """
    path = locate(path_or_id)
    if path.is_dir():
        return open_folder(path)
    if path.suffix == ".gguf":
        return open_gguf(path)
    raise ConversionError(f"{path} is neither a folder nor a .gguf file; give the folder that holds config.json")


def locate(path_or_id: str | Path) -> Path:
    """Returns the local path of a checkpoint, downloading it where a hub id is given.

    Raises:
      ConversionError: there is no such path, or the download failed.
    """
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    if isinstance(path_or_id, Path) or not _HUB_ID.fullmatch(path_or_id):
        raise ConversionError(
            f"{path} does not exist; give a Hugging Face folder, a .gguf file or a hub id (owner/name)"
        )
    try:
        return Path(huggingface_hub.snapshot_download(path_or_id, allow_patterns=list(_WANTED)))
    except (OSError, HFValidationError) as error:
        raise ConversionError(
            f"{path_or_id!r} is no path here, and as a hub id cannot be had ({type(error).__name__}: {error}); "
            "check name and connection (`hf auth login` for a gated model), or give a folder downloaded elsewhere"
        ) from error
