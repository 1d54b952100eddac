"""Which tensor of a damaged safetensors file is wrong: the library that reads them says why, not always which."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

_LENGTH: Final = 8  # bytes of the header's length
_LARGEST: Final = 100_000_000  # bytes that a header may take, as for the library
_ITEM: Final[Mapping[str, int]] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


def describe_damage(file: Path) -> str:
    """Returns what is wrong with the header of a safetensors file, the first tensor that is named; "" if unknown."""
    size = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(_LENGTH), "little")
        if size < _LENGTH or length > min(size - _LENGTH, _LARGEST):
            return f"its header would take {length} bytes"
        try:
            header = json.loads(content.read(length))
        except (ValueError, RecursionError):
            return "its header is no JSON"
    if not isinstance(header, dict):
        return "its header is no object"
    header.pop("__metadata__", None)
    end = 0
    for name, entry in sorted(header.items(), key=_start):
        wrong = _describe(entry, end, size - _LENGTH - length)
        if wrong:
            return f"tensor {name} {wrong}"
        end = entry["data_offsets"][1]
    return ""


def _start(item: tuple[str, Any]) -> int:
    entry = item[1]
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return offsets[0] if _are_sizes(offsets) and offsets else -1


def _describe(entry: Any, previous: int, length: int) -> str:
    if not isinstance(entry, dict):
        return "is described by no object"
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    dtype: Any = entry.get("dtype")
    if not _are_sizes(shape):
        return f"has the shape {shape}"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] != previous:
        return f"lies at {offsets}, where {previous} is its start"
    if dtype not in _ITEM:
        return f"has the dtype {dtype!r}"
    if offsets[1] - offsets[0] != math.prod(shape) * _ITEM[dtype]:
        return f"has {offsets[1] - offsets[0]} bytes for shape {shape} of {dtype}"
    return f"ends at {offsets[1]} of {length} bytes" if offsets[1] > length else ""


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, int) and value >= 0 for value in values)
