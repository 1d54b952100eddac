"""The order in which int4 codes lie in memory, so that what a thread loads is what its tensor core operand needs.

A thread's load of 8 neighbouring codes fills one 32-bit register. The operand of a bfloat16 product wants pairs of
inputs that lie 8 apart, that of an int8 product runs of four that lie 16 apart. So that no thread need send codes to
another, each run of 32 inputs is stored in another order (t the thread of four, e and i the nibble's place):

    bfloat16   stored[8 t + 4 e + i] = code[8 i + 2 t + e]     t, i < 4, e < 2
    int8       stored[8 t + 2 b + i] = code[16 i + 4 t + b]    t, b < 4, i < 2

Both are exact and reversible: a permutation of axes. `prepare` writes them once.
"""

from dataclasses import dataclass
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

RUN: Final = 32  # inputs of one permutation: 8 codes for each of the 4 threads that share a row


@dataclass(frozen=True)
class Order:
    """A permutation of every 32 neighbouring inputs, as a reshape and a transpose.

    Attributes:
      split: the lengths into which 32 inputs are split, slowest first.
      axes: which of them comes where in memory.
    """

    split: tuple[int, int, int]
    axes: tuple[int, int, int]

    def apply(self, codes: Int[Array, "out in"]) -> Int[Array, "out in"]:
        """Returns codes in the order in which they are stored.

        Example:
          >>> codes = jnp.arange(32, dtype=jnp.int8)[None]
          >>> [int(code) for code in stored_bf16.apply(codes)[0, :8]]
          [0, 8, 16, 24, 1, 9, 17, 25]
        """
        return self._permute(codes, self.split, self.axes)

    def invert(self, stored: Int[Array, "out in"]) -> Int[Array, "out in"]:
        """Returns stored codes in the order of the inputs."""
        lengths = (self.split[self.axes[0]], self.split[self.axes[1]], self.split[self.axes[2]])
        inverse = (self.axes.index(0), self.axes.index(1), self.axes.index(2))
        return self._permute(stored, lengths, inverse)

    def _permute(self, codes: jax.Array, lengths: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
        rows, columns = codes.shape
        runs = codes.reshape(rows, columns // RUN, *lengths)
        return jnp.transpose(runs, (0, 1, *(axis + 2 for axis in axes))).reshape(rows, columns)


stored_bf16: Final = Order(split=(4, 4, 2), axes=(1, 2, 0))
stored_int8: Final = Order(split=(2, 4, 4), axes=(1, 2, 0))
