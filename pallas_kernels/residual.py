"""The residual stream around products of few tokens: the sum and the norm between two of them, made in their kernels.

    behind a product        sum = stream + x W,     numbers = bfloat16(scale * sum),     squares of a block's outputs
    before the next one     y = (numbers W') / sqrt(mean(sum^2) + eps)

A norm divides a token by one number, and so may be its product with a weight. So nothing waits for the mean: the block
that has a tile of the sum adds up its squares, and the blocks of the next product add up those of all tiles while their
first copies are under way. Numbers are rounded once, as a norm's are, but before they are divided.
"""

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16, Float32, Shaped

from pallas_kernels import compat, gate

REDUCTION_BYTES: Final = 1024  # of a warpgroup's sums over rows: Pallas keeps two float32 of each thread there


class Undivided(NamedTuple):
    """A norm whose tokens are not yet divided by sqrt(mean(sum^2) + eps).

    Attributes:
      numbers: scale * sum.
      squares: sums of sum^2 over runs of features, filled up with runs of 0 to a multiple of 64; a column for each
        token, filled up to a multiple of 8.
    """

    numbers: BFloat16[Array, "tokens features"]
    squares: Float32[Array, "runs columns"]

    def factors(self, eps: float) -> Float32[Array, "tokens"]:
        """Returns 1 / sqrt(mean(sum^2) + eps).

        >>> Undivided(jnp.ones((1, 4), jnp.bfloat16), jnp.full((2, 8), 2.0)).factors(0.0).tolist()
        [1.0]
        """
        tokens, features = self.numbers.shape
        return lax.rsqrt(jnp.sum(self.squares, axis=0)[:tokens] / features + eps)


@dataclass(frozen=True)
class Ends:
    """What a kernel of few tokens does with its product beside storing it, in the first warpgroup of a first split.

    Attributes:
      inputs: numbers of a token.
      eps: of the norm whose tokens are still to be divided; None where they are, or have none.
      onto: whether the product is added to the stream, and the next norm begun.
      gated: whether the product is that of a gate and of what it opens, and stored as one: see `gate`.
    """

    inputs: int
    eps: float | None = None
    onto: bool = False
    gated: bool = False

    def fault(self, splits: int, rows: int, *, clustered: bool) -> str | None:
        """Returns why blocks of so many rows cannot end so; None where they can."""
        if (self.onto or self.gated) and splits > 1 and not clustered:
            return f"XLA would add the {splits} splits, so that no kernel has the sum"
        if self.gated and rows != 2 * compat.ROWS_OF_ACCUMULATOR:
            return f"blocks of {rows} outputs, a gate's have {2 * compat.ROWS_OF_ACCUMULATOR}"
        return None

    @property
    def halves(self) -> int:
        """Returns how many rows of the weight make one number: 2 of a gate and up."""
        return 1 + self.gated

    def stored(self, rows: int) -> int:
        """Returns how many numbers of a token so many rows of the weight make."""
        return rows // self.halves

    def parts(self, rows: int) -> tuple[int, ...]:
        """Returns the axes of the numbers of so many rows, as blocks copy them: two where half are up's."""
        return (2, rows // 2) if self.gated else (rows,)

    def parted(self, array: Shaped[Array, "groups outputs"]) -> Shaped[Array, "groups *parts"]:
        """Returns an array with those axes."""
        return array.reshape(*array.shape[:-1], *self.parts(array.shape[-1]))

    def made(self, tokens: int, outputs: int, rows: int, columns: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns what is stored beside the product: the sum, and the squares of each block's outputs."""
        if not self.onto:
            return ()
        shapes = (tokens, outputs), (_runs(outputs // rows), columns)
        return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

    def reduction_bytes(self) -> int:
        """Returns the bytes that sums over the rows of a product take."""
        return REDUCTION_BYTES if self.onto or self.eps is not None else 0

    def scratch(self, rows: int, columns: int) -> dict[str, Any]:
        """Returns the shared memory and barriers, by the names of the body's arguments."""
        if not self.onto:
            return {}
        shared = compat.SharedMemory
        return {
            "stream_smem": shared((columns, rows), jnp.float32, transforms=compat.tiled(32, jnp.float32)),
            "squares_smem": shared((2, columns), jnp.float32),
            "streamed": compat.Barrier(num_arrivals=1),
        }

    def load(self, gmem: dict[str, Any], outputs: Any) -> dict[str, Any]:
        """Loads what the end needs while the first copies are under way: it is waited for where it is used."""
        found = {}
        if self.eps is not None:
            found["squares"] = compat.load(gmem["squares"], compat.C, checked=False)
        if self.onto:
            found["scale"] = compat.load(gmem["scale"].at[outputs], compat.ROWS, checked=False)
        return found

    def fetch(self, gmem: dict[str, Any], memory: dict[str, Any], outputs: Any) -> None:
        """Starts the copy of the stream's tile."""
        if self.onto:
            target = memory["stream_smem"]
            compat.copy_in(gmem["stream"].at[pl.ds(0, target.shape[0]), outputs], target, memory["streamed"])

    def finished(self, value: Any, loaded: dict[str, Any]) -> Any:
        """Returns the product of the tokens divided, and what a gate lets through of it."""
        if self.eps is not None:
            mean = jnp.sum(loaded["squares"], axis=0) * jnp.float32(1 / self.inputs)
            value = value * compat.along_columns(lax.rsqrt(mean + jnp.float32(self.eps)), value.shape)
        return gate.gated(value) if self.gated else value

    def summed(self, value: Any, memory: dict[str, Any]) -> Any:
        """Returns stream + value, and leaves it where the stream was."""
        stream = memory["stream_smem"]
        compat.wait(memory["streamed"])
        value = value + compat.cast(compat.load(stream.T, compat.C_TRANSPOSED), compat.C)
        stream.T[...] = compat.cast(value, compat.C_TRANSPOSED)
        return value

    def store(self, sum_: Any, gmem: dict[str, Any], memory: dict[str, Any], outputs: Any, tile: Any) -> None:
        """Stores the sum, which `summed` has left, and its squares; runs behind the last tile's are 0."""
        stream, squares, runs = memory["stream_smem"], memory["squares_smem"], gmem["squares of sum"]
        compat.copy_out(stream, gmem["sum"].at[pl.ds(0, stream.shape[0]), outputs])
        own = jnp.sum(sum_ * sum_, axis=0)
        squares[0], squares[1] = own, compat.cast(jnp.zeros(own.shape, jnp.float32), compat.COLUMNS)
        compat.commit()
        compat.copy_out(squares.at[0], runs.at[tile])
        tiles = gmem["sum"].shape[1] // sum_.shape[0]
        for first in range(tiles, runs.shape[0], tiles):

            @pl.when(first + tile < runs.shape[0])
            def _(first: int = first) -> None:
                compat.copy_out(squares.at[1], runs.at[first + tile])


def _runs(tiles: int) -> int:
    """Returns how many sums of squares there are: a multiple of what a layout of sums has rows."""
    return compat.ROWS_OF_ACCUMULATOR * compat.whole_tiles(tiles, compat.ROWS_OF_ACCUMULATOR)
