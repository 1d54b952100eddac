"""Statistics of the source model's own activations on disk, so that many recipes use what was collected once.

Each file holds one statistic of all sites of one block. The folder's name is a digest of what decides them: the model,
the calibration windows, versions and device. A file is written whole or not at all; any may be deleted at any time.
"""

import contextlib
import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jquant.blocks import StatisticStore
from jquant.errors import CheckpointError


@final
@dataclass(frozen=True)
class SharedStatistics(StatisticStore):
    """A folder of statistics.

    Attributes:
      path: the folder; made by the first `put`.
      blocks: how many blocks the model has.
    """

    path: Path
    blocks: int

    @classmethod
    def of(cls, parent: Path, blocks: int, origin: Mapping[str, str]) -> "SharedStatistics":
        """Returns the folder below `parent` that belongs to an origin.

        Args:
          parent: where such folders lie.
          blocks: how many blocks the model has.
          origin: whatever decides the statistics: digests of model and calibration windows, versions, the device.
        """
        key = hashlib.sha256(json.dumps(dict(origin), sort_keys=True).encode()).hexdigest()[:16]
        return cls(parent / f"statistics-{key}", blocks)

    def complete(self, name: str) -> bool:
        """Tells whether a statistic is kept for every block."""
        return all(self._file(index, name).exists() for index in range(self.blocks))

    def get(self, index: int, name: str, empty: Any) -> Any | None:
        """Returns a statistic of one block, or None if it has not been collected.

        Args:
          index: the block's place, from 0.
          name: the statistic's.
          empty: a tree of that statistic's structure.

        Raises:
          CheckpointError: the file is damaged or holds something else.
        """
        file = self._file(index, name)
        if not file.exists():
            return None
        leaves, structure = jax.tree.flatten(empty)
        try:
            stored = load_file(file)
            arrays = [stored[str(number)] for number in range(len(leaves))]
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(f"{file} cannot be read ({error!r}); delete it to collect it again") from error
        for array, leaf in zip(arrays, leaves, strict=True):
            if array.shape != leaf.shape or array.dtype != leaf.dtype:
                given, expected = f"{array.dtype}{array.shape}", f"{leaf.dtype}{leaf.shape}"
                raise CheckpointError(f"{file} holds {given} for {expected}; delete it to collect it again")
        return jax.tree.unflatten(structure, [jnp.asarray(array) for array in arrays])

    def put(self, index: int, name: str, statistic: Any) -> None:
        """Keeps a statistic of one block.

        Raises:
          CheckpointError: it cannot be written.
        """
        file = self._file(index, name)
        arrays = {str(number): np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(statistic))}
        partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")  # others may collect the same
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            save_file(arrays, partial)
            partial.replace(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot write {file}: {error}. Statistics take 4 bytes for each pair of inputs of a site; give a "
                "folder with more room, or share nothing"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()

    def _file(self, index: int, name: str) -> Path:
        return self.path / f"{name}-{index:03d}.safetensors"
