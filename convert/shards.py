"""Safetensors files written one tensor after another: no more than one part is in memory, however large the file.

A file is its header's length in 8 bytes, the header in JSON (dtype, shape and place of each tensor), and the tensors,
row by row. Wider items come first, so that every tensor starts at a multiple of its item's size, which readers that
map the file rely on. `metadata.format` is "pt": transformers refuses files without it.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from jaxtyping import Shaped

from convert.base import Header

LIMIT: Final = 5_000_000_000  # bytes of one file: what the hub and transformers cut at
SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_ALIGNMENT: Final = 8  # of the header's length, in bytes

# dtype as `Header` has it -> (safetensors' word, bytes of an item)
_DTYPES: Final[Mapping[str, tuple[str, int]]] = {
    "float32": ("F32", 4),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "I64": ("I64", 8),
    "I32": ("I32", 4),
    "I8": ("I8", 1),
}


class Part(NamedTuple):
    """Tensors that are made together, such as those of one linear.

    Attributes:
      headers: shape and dtype of each, by name; known before any is made.
      make: makes them, by name.
    """

    headers: Mapping[str, Header]
    make: Callable[[], Mapping[str, Shaped[np.ndarray, "..."]]]


def write_shards(folder: Path, parts: Sequence[Part], *, limit: int = LIMIT) -> int:
    """Writes tensors as model.safetensors, or as several files and their index.

    Args:
      folder: where to write; it exists.
      parts: what to write, in the order of the files.
      limit: bytes of tensors in one file; a part that is larger has a file of its own.

    Returns:
      The bytes of all tensors.
    """
    shards = _cut(parts, limit)
    total = sum(_nbytes(part) for part in parts)
    if len(shards) == 1:
        _write(folder / SINGLE, shards[0])
        return total
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        name = f"model-{index:05}-of-{len(shards):05}.safetensors"
        _write(folder / name, shard)
        weight_map |= {tensor: name for part in shard for tensor in part.headers}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(content, indent=2), "utf-8")
    return total


def _cut(parts: Sequence[Part], limit: int) -> list[list[Part]]:
    shards: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        if shards[-1] and size + _nbytes(part) > limit:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += _nbytes(part)
    return shards


def _write(file: Path, parts: Sequence[Part]) -> None:
    headers = {name: header for part in parts for name, header in part.headers.items()}
    ordered = sorted(headers, key=lambda name: -_DTYPES[headers[name].dtype][1])  # stable: else in the given order
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name in ordered:
        starts[name], end = end, end + _size(headers[name])
        word, _ = _DTYPES[headers[name].dtype]
        described[name] = {"dtype": word, "shape": list(headers[name].shape), "data_offsets": [starts[name], end]}
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        first = out.tell()
        out.truncate(first + end)
        for part in parts:
            for name, array in part.make().items():
                content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                assert len(content) == _size(headers[name]), f"{name} is {array.shape}, not {headers[name]}"
                out.seek(first + starts[name])
                out.write(content.data)


def _nbytes(part: Part) -> int:
    return sum(_size(header) for header in part.headers.values())


def _size(header: Header) -> int:
    return math.prod(header.shape) * _DTYPES[header.dtype][1]
