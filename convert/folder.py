"""Hugging Face folders: config.json beside safetensors, one file or several and an index. Nothing is unpickled."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError, safe_open

from convert.base import Header, Source
from convert.damage import describe_damage
from jquant.errors import ConversionError

_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_PICKLED: Final = (".bin", ".pt", ".pth", ".ckpt")
_DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def open_folder(folder: Path) -> Source:
    """Opens a Hugging Face folder; reads config.json and the headers of its safetensors files, no tensor.

    Args:
      folder: holds config.json, and model.safetensors or the shards that model.safetensors.index.json names.

    Returns:
      The source; its `read` maps the tensor's file and copies that one tensor.

    Raises:
      ConversionError: a file is missing, truncated or damaged, or the weights are pickled.
    """
    files = _weight_files(folder)
    config = _read_json(folder / "config.json")
    shards: dict[str, Path] = {}
    headers: dict[str, Header] = {}
    for file in sorted(set(files)):
        for name, header in _read_headers(file).items():
            if name in headers:
                raise ConversionError(
                    f"tensor {name} is both in {shards[name].name} and in {file.name} of {folder}; remove one"
                )
            headers[name], shards[name] = header, file

    def read(name: str) -> np.ndarray:
        with safe_open(shards[name], framework="numpy") as tensors:
            return tensors.get_tensor(name)

    return Source(folder, config, headers, read, shards)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        index = _read_json(folder / _INDEX)
        if not isinstance(index.get("weight_map"), dict):
            raise ConversionError(f"{folder / _INDEX} has no weight_map; download that file again")
        names = {str(shard) for shard in index["weight_map"].values()}
        outside = sorted(name for name in names if name != Path(name).name or not Path(name).name)
        if outside:
            raise ConversionError(
                f"{folder / _INDEX} names {outside[0]!r}, which is no file of this folder; none is read"
            )
        files = [folder / name for name in names]
        missing = sorted({file.name for file in files if not file.is_file()})
        if missing:
            raise ConversionError(f"{folder} lacks {', '.join(missing)}, which {_INDEX} names; download them")
        return files
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    raise ConversionError(_what_else(folder))


def _what_else(folder: Path) -> str:
    files = sorted(file.name for file in folder.iterdir() if file.is_file())
    shards = [name for name in files if name.endswith(".safetensors")]
    pickled = [name for name in files if name.endswith(_PICKLED)]
    gguf = [name for name in files if name.endswith(".gguf")]
    if shards:
        return f"{folder} has {', '.join(shards)} but neither {_SINGLE} nor {_INDEX}; add the index that came with them"
    if pickled:
        return (
            f"{folder} has its weights only as pickled files ({', '.join(pickled)}); reading one can run any code, "
            "so none is opened here; look for a safetensors version, or write one with transformers' save_pretrained"
        )
    if gguf:
        return f"{folder} is a folder of GGUF files; give the file itself, such as {folder / gguf[0]}"
    return f"{folder} has no {_SINGLE}, {_INDEX} or .gguf file; is it the folder of a checkpoint?"


def _read_json(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        raise ConversionError(f"{file} is missing; copy it from where the checkpoint came from")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{file} is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{file} holds a {type(content).__name__} where an object is expected; download it again")
    return content


def _read_headers(file: Path) -> dict[str, Header]:
    try:
        with safe_open(file, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
            return {name: _header(part) for name, part in slices.items()}
    except SafetensorError as error:
        size, damage = file.stat().st_size, describe_damage(file) or error
        raise ConversionError(
            f"{file} cannot be read: {damage}; it has {size} bytes, and is truncated or damaged; download it again"
        ) from error


def _header(part: Any) -> Header:
    return Header(tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype()))
