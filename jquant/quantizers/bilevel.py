"""Two-level grids: small groups whose scales and real zeros are rounded too, as SpQR fits them (arXiv:2306.03078).

For one group of inputs, every output on its own:

    scale = (max - min) / (2^b - 1),     zero = -min / scale,
    code = clip(round(w / scale + zero), 0, 2^b - 1),     q = scale * (code - zero).

Zero need not lie in the range, and the zero is a real number. On the second level the scales of neighbouring outputs,
and likewise their zeros, are rounded to 2^b' levels from their least, which is exact, to their largest. A range without
width would have no scale: `fidelity` "paper" keeps such a constant on the grid, "reference" makes it [-1, 1], as the
reference implementation does on both levels (spec_weights.md section 6.1).
"""

from typing import Final, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from jquant.formats import SpqrFormat, StatisticCodes
from jquant.numerics import as_stored

type Fidelity = Literal["paper", "reference"]

CONSTANT: Final = 2**-10  # a group whose range is smaller, relative to its values, is constant: 16 bits hold no more


class Grids(NamedTuple):
    """The grid of a group: scales and zeros as stored, and the codes that stand for them (None: stored as numbers)."""

    scales: Float[Array, "*groups out"]
    zeros: Float[Array, "*groups out"]
    scale_codes: StatisticCodes | None
    zero_codes: StatisticCodes | None


def fit_group(
    rows: Float[Array, "size out"], removed: Bool[Array, "size out"], format: SpqrFormat, fidelity: Fidelity
) -> Grids:
    """Fits the two-level grid of one group.

    Args:
      rows: the weights of the group.
      removed: weights that the grid need not fit.
      format: bits of both levels, outputs that share a second level, and how its numbers are stored.
      fidelity: what a range without width becomes.

    Returns:
      The grid of each output.
    """
    rows = _fill(rows, removed)
    scales, zeros = _grid(jnp.min(rows, axis=0), jnp.max(rows, axis=0), format.bits, fidelity)
    scales, scale_codes = _second_level(scales, format.scale_bits, format, fidelity)
    zeros, zero_codes = _second_level(zeros, format.zero_bits, format, fidelity)
    return Grids(scales, zeros, scale_codes, zero_codes)


def leave_one_out(
    rows: Float[Array, "size out"],
    removed: Bool[Array, "size out"],
    counts: Float[Array, "size"],
    limit: Float[Array, ""],
    bits: int,
    fidelity: Fidelity,
) -> Bool[Array, "size out"]:
    """Tells which weights of a group cost so much that its grid had better ignore them.

    The gain of weight k is sum_i e_i^2 - sum_{i != k} e_i'^2, with e of the grid fitted to all, e' of that fitted to
    all but k, first level alone. One weight far out makes its group's grid so coarse that every weight would be told:
    "paper" then tells that of the largest gain, while "reference" tells all and has nothing left to fit the grid to.

    Args:
      rows: the weights of the group.
      removed: weights that the grid need not fit anyway; they count as the mean of the rest.
      counts: how much an error in each row counts; e = counts * (w - q).
      limit: the gain from which on a weight is told.
      bits: bits of one code.
      fidelity: what a range without width becomes, and what is told if all would be.

    Returns:
      Where the gain exceeds the limit.
    """
    rows, numbers = _fill(rows, removed), jnp.arange(rows.shape[0])

    def errors(low: Float[Array, "out"], high: Float[Array, "out"]) -> Float[Array, "size out"]:
        scales, zeros = _grid(low, high, bits, fidelity)
        _, rounded = nearest(rows, scales[None], zeros[None], bits)
        return ((rounded - rows) * counts[:, None]) ** 2

    def least(values: Float[Array, "size out"]) -> tuple[Float[Array, "out"], Int[Array, "out"], Float[Array, "out"]]:
        """Returns the least value, its place, and the least of the others."""
        place = jnp.argmin(values, axis=0)
        others = jnp.where(numbers[:, None] == place[None, :], jnp.inf, values)
        return jnp.min(values, axis=0), place, jnp.min(others, axis=0)

    low, low_place, next_low = least(rows)
    high, high_place, next_high = least(-rows)
    whole = jnp.sum(errors(low, -high), axis=0)

    def gain(number: Int[Array, ""]) -> Float[Array, "out"]:
        own_low = jnp.where(low_place == number, next_low, low)
        own_high = -jnp.where(high_place == number, next_high, high)
        others = jnp.where((numbers == number)[:, None], 0.0, errors(own_low, own_high))
        return whole - jnp.sum(others, axis=0)

    gains = jax.vmap(gain)(numbers)
    told = gains > limit
    if fidelity == "reference":
        return told
    none_left = jnp.all(told | removed, axis=0)
    return jnp.where(none_left[None, :], gains == jnp.max(gains, axis=0)[None, :], told)


def nearest(
    values: Float[Array, "*shape"], scales: Float[Array, "*grid"], zeros: Float[Array, "*grid"], bits: int
) -> tuple[UInt8[Array, "*shape"], Float[Array, "*shape"]]:
    """Returns the codes of the grid points nearest to the values, and the points; a scale of 0 has the point 0 alone.

    >>> codes, points = nearest(jnp.array([0.2, 3.0]), jnp.array([0.5, 0.5]), jnp.array([0.5, 0.5]), bits=2)
    >>> codes.tolist(), points.tolist()
    ([1, 3], [0.25, 1.25])
    """
    codes = jnp.clip(jnp.round(values / jnp.where(scales > 0, scales, 1.0) + zeros), 0, 2**bits - 1)
    return codes.astype(jnp.uint8), scales * (codes - zeros)


def _grid(
    low: Float[Array, "out"], high: Float[Array, "out"], bits: int, fidelity: Fidelity
) -> tuple[Float[Array, "out"], Float[Array, "out"]]:
    """Returns scale and real zero of a range.

    A constant c gets scale |c| and a zero near the middle of the codes: c is on the grid, and the zero is as others'.
    """
    levels = 2**bits - 1
    if fidelity == "reference":
        low, high = _widen(low, high)
        scales = (high - low) / levels
        return scales, -low / scales
    constant = high - low <= CONSTANT * jnp.maximum(jnp.abs(low), jnp.abs(high))
    scales = jnp.where(constant, 1.0, (high - low) / levels)
    middle = (low + high) / 2
    center = jnp.where(middle > 0, (levels - 1) / 2, (levels + 1) / 2)
    return jnp.where(constant, jnp.abs(middle), scales), jnp.where(constant, center, -low / scales)


def _second_level(
    values: Float[Array, "out"], bits: int | None, format: SpqrFormat, fidelity: Fidelity
) -> tuple[Float[Array, "out"], StatisticCodes | None]:
    """Rounds one statistic of all outputs to the levels of its run; returns what is stored, and its codes."""
    if bits is None:
        return as_stored(values, format.dtype), None
    runs = values.reshape(-1, format.second_group_size)
    low, high = jnp.min(runs, axis=1), jnp.max(runs, axis=1)
    if fidelity == "reference":
        low, high = _widen(low, high)
    bases = as_stored(low, format.dtype)
    steps = as_stored(jnp.maximum((high - bases) / (2**bits - 1), 0.0), format.dtype)
    divisors = jnp.where(steps > 0, steps, 1.0)
    codes = jnp.clip(jnp.round((runs - bases[:, None]) / divisors[:, None]), 0, 2**bits - 1)
    rounded = bases[:, None] + steps[:, None] * codes
    return rounded.reshape(-1), StatisticCodes(codes.reshape(-1).astype(jnp.uint8), steps, bases)


def _fill(rows: Float[Array, "size out"], removed: Bool[Array, "size out"]) -> Float[Array, "size out"]:
    """Replaces what is removed by the mean of the rest of its group, 0 if nothing is left."""
    left = jnp.maximum(jnp.sum(~removed, axis=0), 1).astype(rows.dtype)
    mean = jnp.sum(jnp.where(removed, 0.0, rows), axis=0) / left
    return jnp.where(removed, mean[None, :], rows)


def _widen(low: Float[Array, "n"], high: Float[Array, "n"]) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
    """Makes a range without width [-1, 1]."""
    return jnp.where(low == high, -1.0, low), jnp.where(low == high, 1.0, high)
