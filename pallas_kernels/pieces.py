"""Activations as integers on the grids of their groups: what binary.py multiplies by signs.

    step = 2^(floor(log2 max |x|) - 13),    round(x / step) = 256 high + low,    sum = sum_k x

of each group of inputs of each token. XLA makes them in three kernels, some 4 us (`pieces_by_xla`). One kernel makes
the same (`pieces_by_kernel`): products of 7168 x 28672 take 42.7 us with it and 44.1 without (H100, 2026-11-23). There
64 groups are the rows of a block's tile, so that a row's largest number and its sum are those of four threads:

    x [groups, group] -> registers -> high and low, int8 [groups, group] of each token
                                   -> a group's row of 2 x 16 float32: each column's step, and its sum

A column is a piece of a token, high and low by turns. A block has one token; where there are more, XLA adds their
columns.
"""

from dataclasses import dataclass
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16, Float32, Int8

from pallas_kernels import compat

PIECES: Final = 2  # int8 numbers that an activation becomes
COLUMNS: Final = 16  # float32 of a group's row: a copy moves at least 128 bytes, two rows of these
EIGHT: Final = compat.LEAST_COLUMNS  # rows of the tiles that are copied
ROWS: Final = compat.ROWS_OF_ACCUMULATOR
DIGITS: Final = 13  # of a group's largest number after its first: the high piece is at most 64
MANTISSA: Final = 23  # bits of a float32's
EXPONENT: Final = 0x7F800000
LEAST: Final = 16 << MANTISSA  # smaller exponents' steps would not be float32: such groups count as zeros
ROUNDER: Final = 1.5 * 2.0**23  # adding it leaves the nearest whole number in the last bits


def pieces_by_xla(
    x: BFloat16[Array, "tokens in"], group: int, bits: int
) -> tuple[Int8[Array, "pieces in"], Float32[Array, "groups 2 16"]]:
    """Returns what `pieces_by_kernel` does; columns beyond the last token's are its own again.

    Args:
      x: activations.
      group: inputs that share a step.
      bits: planes of signs that the pieces will be multiplied by.
    """
    tokens, inputs = x.shape
    apart = x.astype(jnp.float32).reshape(tokens, inputs // group, group)
    nothing = jnp.float32(0)
    largest, sums = lax.reduce((jnp.abs(apart), apart), (nothing, nothing), _largest_and_sum, (2,))  # one XLA kernel
    power = lax.bitcast_convert_type(lax.bitcast_convert_type(largest, jnp.int32) & EXPONENT, jnp.float32)
    step = jnp.where(power == 0, 1.0, power) / 2**DIGITS
    whole = jnp.round(apart / step[:, :, None]).astype(jnp.int32)  # below 2^(DIGITS + 1)
    high = (whole + 128) >> 8
    both = jnp.stack([high, whole - 256 * high], axis=1).astype(jnp.int8).reshape(PIECES * tokens, inputs)
    column = jnp.arange(COLUMNS)
    token, of_high = jnp.minimum(column // PIECES, tokens - 1), (column % PIECES == 0)[None]
    factor = 2.0 ** (2 - bits)  # of alphas as they are kept, and of signs 2^p: 2 alpha 2^-p
    steps = step.T[:, token] * jnp.where(of_high, 256 * factor, factor)
    return both, jnp.stack([steps, jnp.where(of_high, sums.T[:, token], 0.0)], axis=1)


def _largest_and_sum(one: Any, other: Any) -> Any:
    return jnp.maximum(one[0], other[0]), one[1] + other[1]


def pieces_by_kernel(
    x: BFloat16[Array, "tokens in"], group: int, bits: int, simulate: compat.Simulation | None = None
) -> tuple[Int8[Array, "pieces in"], Float32[Array, "groups 2 16"]]:
    """Returns the pieces, high and low by turns, and of each group every column's step and sum.

    Steps are times 2^(2 - bits), for alphas as they are kept and signs 2^p, and the high pieces' times 256.

    Args:
      x: activations.
      group: inputs that share a step.
      bits: planes of signs that the pieces will be multiplied by.
      simulate: run in the interpreter on the CPU with these settings.
    """
    (tokens, inputs), groups = x.shape, x.shape[1] // group
    blocks = compat.whole_tiles(groups, ROWS)
    rows = EIGHT * compat.whole_tiles(groups, EIGHT) if simulate is None else blocks * ROWS  # copies drop the rest
    view = x.reshape(tokens, groups, group)
    view = view if rows == groups else jnp.pad(view, ((0, 0), (0, rows - groups), (0, 0)))
    kernel = _Kernel(2.0 ** (2 - bits - DIGITS))
    shared, blocked = compat.SharedMemory, (ROWS, group)
    pieces, grids = compat.kernel(
        kernel.body,
        out=(
            jax.ShapeDtypeStruct((tokens, PIECES, rows, group), jnp.int8),
            jax.ShapeDtypeStruct((tokens, rows, 2 * COLUMNS), jnp.float32),
        ),
        scratch={
            "x_smem": shared(blocked, x.dtype, transforms=compat.tiled(group, x.dtype)),
            "high_smem": shared(blocked, jnp.int8, transforms=compat.tiled(group, jnp.int8)),
            "low_smem": shared(blocked, jnp.int8, transforms=compat.tiled(group, jnp.int8)),
            "grids_smem": shared((ROWS, 2 * COLUMNS), jnp.float32, transforms=compat.tiled(2 * COLUMNS, jnp.float32)),
            "full": compat.Barrier(),
        },
        grid={"token": tokens, "block": blocks},
        simulate=simulate,
    )(view)
    whole = grids[0] if tokens == 1 else grids.sum(axis=0)  # each token's columns, zeros elsewhere
    return pieces[:, :, :groups].reshape(PIECES * tokens, inputs), whole[:groups].reshape(groups, 2, COLUMNS)


@dataclass(frozen=True)
class _Kernel:
    """One kernel's program, and the factor of its steps."""

    factor: float

    def body(self, x_gmem: Any, pieces_gmem: Any, grids_gmem: Any, **memory: Any) -> None:
        """One warpgroup's program."""
        token, block, shape = lax.axis_index("token"), lax.axis_index("block"), (ROWS, 2 * COLUMNS)
        rows = pl.ds(block * ROWS, ROWS)
        compat.copy_in(x_gmem.at[token, rows], memory["x_smem"], memory["full"])
        compat.wait(memory["full"])
        x = compat.load(memory["x_smem"], compat.C).astype(jnp.float32)
        largest = lax.bitcast_convert_type(jnp.max(jnp.abs(x), axis=1), jnp.int32) & EXPONENT
        one = jnp.int32(127 << MANTISSA)
        power = jnp.where(largest < LEAST, one, largest)
        inverse = lax.bitcast_convert_type(2 * one + (DIGITS << MANTISSA) - power, jnp.float32)
        number = x * compat.along_rows(inverse, x.shape) + jnp.float32(ROUNDER)
        whole = lax.bitcast_convert_type(number, jnp.int32)  # its last byte is low, as two's complement
        memory["high_smem"][...] = ((whole + 128) >> 8).astype(jnp.int8)
        memory["low_smem"][...] = whole.astype(jnp.int8)
        column = compat.iota(shape, 1, compat.C)
        of_high = lax.rem(column, 2) == 0
        step = lax.bitcast_convert_type(power, jnp.float32) * jnp.float32(self.factor)
        steps = compat.along_rows(step, shape) * jnp.where(of_high, jnp.float32(256), jnp.float32(1))
        sums = jnp.where(of_high, compat.along_rows(jnp.sum(x, axis=1), shape), jnp.float32(0))
        own = lax.div(lax.rem(column, COLUMNS), PIECES) == token
        memory["grids_smem"][...] = jnp.where(own, jnp.where(column < COLUMNS, steps, sums), jnp.float32(0))
        compat.commit()
        compat.copy_out(memory["high_smem"], pieces_gmem.at[token, 0, rows])
        compat.copy_out(memory["low_smem"], pieces_gmem.at[token, 1, rows])
        compat.copy_out(memory["grids_smem"], grids_gmem.at[token, rows])
        compat.wait_out(0, wait_read_only=True)
