"""Calibration inputs that are kept off the device, in host memory or in a file, and visit it some windows at a time.

Pieces have one size, at least two windows, so that each step over them is one program, whose loop over windows is that
of all windows at once: results are the same to the bit wherever the inputs are kept.
"""

import io
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jquant.errors import CheckpointError

type ActivationPlace = Literal["device", "host", "disk"]

PIECE_NBYTES: Final = 2**26  # most bytes of a piece, unless two windows are larger


@final
@dataclass(frozen=True, eq=False)
class Offloaded:
    """Activations [samples, tokens, hidden] in a file, or in memory that is read as one.

    Attributes:
      shape: of all of them.
      dtype: of their numbers.
      piece: windows that are on the device at once; it divides the samples.
      file: the numbers, window after window.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype
    piece: int
    file: io.BufferedIOBase

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int, int],
        dtype: jax.typing.DTypeLike,
        place: Literal["host", "disk"],
        folder: Path | None = None,
    ) -> "Offloaded":
        """Returns room for activations, which `put` fills piece by piece, in order.

        Args:
          shape: [samples, tokens, hidden].
          dtype: of the numbers.
          place: "host" for memory, "disk" for a file that is gone when it is closed, or when the process ends.
          folder: where such a file is made; None for the system's folder for temporary files.

        Raises:
          CheckpointError: the file cannot be made.

        Example:
          >>> kept = Offloaded.empty((6, 4, 8), "float32", "host")
          >>> kept.put(0, jnp.ones((6, 4, 8)))
          >>> kept.piece, [piece.shape for piece in kept.pieces()]
          (6, [(6, 4, 8)])
        """
        file: io.BufferedIOBase = io.BytesIO()
        if place == "disk":
            try:
                file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (as long as its owner)
            except OSError as error:
                raise CheckpointError(
                    f"cannot write to {folder}: {error}. Choose a folder that you may write to"
                ) from error
        return cls(shape, jnp.dtype(dtype), piece_size(shape, dtype), file)

    def pieces(self) -> Iterator[Float[Array, "piece tokens hidden"]]:
        """Yields the pieces in order, on the device."""
        for index in range(self.shape[0] // self.piece):
            yield self.get(index)

    def get(self, index: int) -> Float[Array, "piece tokens hidden"]:
        """Returns the piece of a place, on the device."""
        shape = (self.piece, *self.shape[1:])
        nbytes = math.prod(shape) * self.dtype.itemsize
        self.file.seek(index * nbytes)
        return jnp.asarray(np.frombuffer(self.file.read(nbytes), self.dtype).reshape(shape))

    def put(self, index: int, piece: Float[Array, "piece tokens hidden"]) -> None:
        """Writes a piece in its place.

        Raises:
          CheckpointError: the disk is full or fails.
        """
        content = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
        try:
            self.file.seek(index * content.nbytes)
            self.file.write(content.data)
            self.file.flush()
        except OSError as error:
            raise CheckpointError(
                f"calibration activations of {math.prod(self.shape) * self.dtype.itemsize / 2**20:.0f} MiB cannot be "
                f"kept on disk: {error}. Free space, keep them elsewhere (--activations), or take fewer samples"
            ) from error


def piece_size(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> int:
    """Returns how many windows make a piece: a divisor of their number, at least 2 where there are 2.

    Example:
      >>> piece_size((128, 2048, 4096), "bfloat16"), piece_size((7, 2048, 4096), "bfloat16")
      (4, 7)
    """
    samples, window = shape[0], math.prod(shape[1:]) * jnp.dtype(dtype).itemsize
    divisors = [count for count in range(min(2, samples), samples + 1) if samples % count == 0]
    fitting = [count for count in divisors if count * window <= PIECE_NBYTES]
    return max(fitting, default=divisors[0])
