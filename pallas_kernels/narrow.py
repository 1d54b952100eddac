"""What the kernels of narrow weights read: binary codes and SpQR's 3 bits, prepared once, exactly, and the way back."""

from typing import Final, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Int, Int8, Integer

from pallas_kernels.binary import LEAST_GROUP, UNITS
from pallas_kernels.compat import ROWS_OF_ACCUMULATOR as TILE
from pallas_kernels.fields import THREES, load_signs, load_threes, store_signs, store_threes
from pallas_kernels.inline import SLOTS
from pallas_kernels.spqr import GROUP, RUNS

MOST_INPUTS: Final = 2**16  # rows of outliers are 16 bits


class BinaryWeight(NamedTuple):
    """Binary codes: w[n, k] = offsets[k // g, n] + sum_p +-alphas[k // g, p, n].

    Attributes:
      signs: int4 [out, in * bits / 4], the words of `fields.store_signs`.
      alphas: float16 [groups, bits, out], plane p's times 2^(bits - 1 - p): its operand is 2^p times a sign.
      offsets: float16 [groups, out]; None where all are 0.
    """

    signs: Int[Array, "out stored"]
    alphas: Float16[Array, "groups bits out"]
    offsets: Float16[Array, "groups out"] | None


def prepare_binary(
    codes: Int[Array, "out in"],
    alphas: Float[Array, "groups bits out"],
    offsets: Float[Array, "groups out"] | None = None,
) -> BinaryWeight:
    """Returns the weight as the kernel reads it; exact but for alphas and offsets that float16 cannot hold.

    Args:
      codes: the signs of each weight: bit p is 1 where plane p has +1.
      alphas: what each plane's sign is multiplied by; rounded to float16.
      offsets: what is added to a group; rounded to float16. None for nothing.

    Raises:
      ValueError: the number of planes, or the size of the groups, has no kernel.

    Example:
      >>> weight = prepare_binary(jnp.full((64, 128), 3, jnp.int8), jnp.ones((1, 2, 64)))
      >>> weight.signs.shape, weight.alphas[0, :, 0].tolist()
      ((64, 64), [2.0, 1.0])
    """
    (groups, bits, _), inputs = alphas.shape, codes.shape[1]
    if bits not in UNITS or inputs % groups or inputs % UNITS[bits] or inputs // groups < LEAST_GROUP:
        raise ValueError(
            f"{bits} planes of {inputs} inputs in {groups} groups: the kernel takes {tuple(UNITS)} planes, a multiple "
            f"of {UNITS.get(bits, 64)} inputs and groups of at least {LEAST_GROUP}; keep the portable layout"
        )
    scaled = alphas.astype(jnp.float16) * _powers(bits)
    return BinaryWeight(store_signs(codes, bits), scaled, None if offsets is None else offsets.astype(jnp.float16))


def restore_binary(
    weight: BinaryWeight,
) -> tuple[Int8[Array, "out in"], Float16[Array, "groups bits out"], Float16[Array, "groups out"] | None]:
    """Returns the codes, alphas and offsets that `prepare_binary` was given, the last two as rounded there."""
    bits = weight.alphas.shape[1]
    return load_signs(weight.signs, bits), weight.alphas / _powers(bits), weight.offsets


def _powers(bits: int) -> Float16[Array, "1 {bits} 1"]:
    return jnp.exp2(jnp.arange(bits - 1, -1, -1, dtype=jnp.float16))[None, :, None]


class SpqrWeight(NamedTuple):
    """SpQR's weight: w[n, k] = scale * (code - zero) of its group of 16 inputs, plus what a slot adds.

    Attributes:
      codes: int4 [out, in * 3 / 4], the words of `fields.store_threes`.
      grid_codes: int8 [out, in / 16], a scale's code in the low four bits and a zero's in the high.
      grids: float16 [out / 64, in / 16, 16]: of each of four runs of 16 outputs the scales' base and step, the zeros'.
      values: float16 [out, slots], what is added; None where there are no outliers.
      rows: uint16 [out, slots], the inputs that they are added at.
    """

    codes: Int[Array, "out stored"]
    grid_codes: Int8[Array, "out groups"]
    grids: Float16[Array, "tiles groups 16"]
    values: Float16[Array, "out slots"] | None
    rows: Integer[Array, "out slots"] | None


class TwoLevelGrids(NamedTuple):
    """Scales and zeros of groups, base + step * code, base and step shared by 16 outputs.

    Attributes:
      scale_codes: 0 to 15, [groups, out].
      zero_codes: likewise.
      parts: float16 [4, groups, out / 16]: the scales' base and step, the zeros'.
    """

    scale_codes: Int[Array, "groups out"]
    zero_codes: Int[Array, "groups out"]
    parts: Float16[Array, "4 groups runs"]


def prepare_spqr(
    codes: Int[Array, "out in"],
    grids: TwoLevelGrids,
    values: Float16[Array, "out slots"] | None = None,
    rows: Integer[Array, "out slots"] | None = None,
) -> SpqrWeight:
    """Returns the weight as the kernel reads it, exactly.

    Args:
      codes: 0 to 7.
      grids: of groups of 16 inputs.
      values: what is added to a weight in each slot of an output, 0 in slots that are not used; None, and no rows,
        where there are no outliers.
      rows: the input of each slot.

    Raises:
      ValueError: the sizes have no kernel, or values are given without rows.
    """
    (outputs, inputs), groups = codes.shape, grids.scale_codes.shape[0]
    if outputs % TILE or inputs % (RUNS * THREES) or inputs != GROUP * groups or inputs > MOST_INPUTS:
        raise ValueError(
            f"SpQR's weight [{outputs}, {inputs}] in {groups} groups: the kernel takes a multiple of {TILE} outputs "
            f"and of {RUNS * THREES} inputs, at most {MOST_INPUTS}, in groups of {GROUP}; keep the portable layout"
        )
    if (values is None) != (rows is None):
        raise ValueError("SpQR's outliers have values or rows alone: give both, or neither")
    both = (grids.scale_codes.astype(jnp.int32) | grids.zero_codes.astype(jnp.int32) << 4).T
    signed = jnp.where(both > 127, both - 256, both).astype(jnp.int8)
    parts = grids.parts.reshape(4, groups, outputs // TILE, 4).transpose(2, 1, 3, 0).reshape(-1, groups, 16)
    if values is None or rows is None:
        return SpqrWeight(store_threes(codes), signed, parts, None, None)
    more = ((0, 0), (0, -values.shape[1] % SLOTS))  # empty slots add 0 at the first input
    places = jnp.pad(rows.astype(jnp.uint16), more)
    return SpqrWeight(store_threes(codes), signed, parts, jnp.pad(values, more), places)


def restore_spqr(weight: SpqrWeight) -> tuple[Int8[Array, "out in"], TwoLevelGrids]:
    """Returns the codes and grids that `prepare_spqr` was given; values and rows are as they were, and empty slots."""
    tiles, groups, _ = weight.grids.shape
    parts = weight.grids.reshape(tiles, groups, 4, 4).transpose(3, 1, 0, 2).reshape(4, groups, 4 * tiles)
    both = weight.grid_codes.T.astype(jnp.int32)
    return load_threes(weight.codes), TwoLevelGrids(both & 15, both >> 4 & 15, parts)
