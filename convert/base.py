"""What a foreign checkpoint looks like to the converter, whichever kind of file it lies in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Header(NamedTuple):
    """What a file says of a tensor before the tensor is read.

    Attributes:
      shape: as the file orders it, [out, in] for a linear layer's weight.
      dtype: "float32", "float16", "bfloat16", or the file's own word for any other.
    """

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint on disk, opened; only headers have been read.

    Attributes:
      location: the folder or the file.
      config: as in Hugging Face's config.json.
      headers: shape and dtype of every tensor, by its Hugging Face name.
      read: reads one tensor, by that name, into memory.
      files: the file that each tensor lies in, by that name; empty where the location is the file.
    """

    location: Path
    config: Mapping[str, Any]
    headers: Mapping[str, Header]
    read: Callable[[str], np.ndarray]
    files: Mapping[str, Path] = field(default_factory=dict)

    def place(self, name: str) -> str:
        """Returns a tensor's file and name, for messages."""
        return f"{self.files.get(name, self.location)}: {name}"
