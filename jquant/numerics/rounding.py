"""Uniform grids: from a range of values to scales and zeros, from values to codes, and back.

    w ~ scales * (codes - zeros),   codes in 0..2^b - 1,   round half to even

| symmetry          | scale                     | zero          | levels relative to the zero |
|-------------------|---------------------------|---------------|-----------------------------|
| "asymmetric"      | (high - low) / (2^b - 1)  | rne(-low / s) | as the range asks           |
| "symmetric"       | absmax / (2^(b-1) - 1)    | 2^(b-1)       | -2^(b-1) .. 2^(b-1) - 1     |
| "symmetric_full"  | 2 absmax / (2^b - 1)      | 2^(b-1)       | -2^(b-1) .. 2^(b-1) - 1     |
| "symmetric_signed"| absmax / 2^(b-1)          | 2^(b-1)       | -2^(b-1) .. 2^(b-1) - 1     |

"symmetric" is the restricted grid of QuaRot, on which both ends of the range are exact. "symmetric_full" is that of
GPTQ and GPTQModel: the largest value lies on a rounding tie, the positive end comes back as 7/7.5 of itself at 4 bits;
its bug that doubles the scale only where a negative value exists is not reproduced. "symmetric_signed" is that of
DeepSpeed's ZeroQuant: -absmax is exact, +absmax is clipped to 7/8 of itself at 4 bits. Everything is computed in
float32, or in float64 where that is given.
"""

import functools
from typing import Final, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt8

from jquant.errors import FormatError
from jquant.types import DType, Leaf, compute_dtype

type Symmetry = Literal["asymmetric", "symmetric", "symmetric_full", "symmetric_signed"]

SEARCH_NORM: Final = 2.4  # exponent of the error in the range search: GPTQ and QuaRot reference code
SEARCH_GRID: Final = 100  # candidates are spaced by 1 / 100: the same
SEARCH_STEPS: Final = 80  # down to 0.21 of the range ("maxshrink" 0.8): the same


class Grid(NamedTuple):
    """Hold a uniform grid, w = scales * (codes - zeros): two float arrays of one shape."""

    scales: Leaf
    zeros: Leaf


def range_of(
    values: Float[Array, "*shape"], axis: int | tuple[int, ...]
) -> tuple[Float[Array, "*rest"], Float[Array, "*rest"]]:
    """Return the range of the values with zero inside: low = min(x, 0), high = max(x, 0).

    Args:
        values: array of any shape and float dtype.
        axis: axis or axes to reduce; they are dropped from the result.

    Returns:
        low <= 0 and high >= 0, in float32 or float64.

    Example:
        >>> low, high = range_of(jnp.array([0.5, 2.0, 1.0]), axis=0)
        >>> float(low), float(high)
        (0.0, 2.0)
    """
    values = _compute(values)
    return jnp.min(values, axis=axis, initial=0.0), jnp.max(values, axis=axis, initial=0.0)


def fit_grid(low: Float[Array, "*shape"], high: Float[Array, "*shape"], bits: int, symmetry: Symmetry) -> Grid:
    """Fit the grid of one symmetry to a range; the table of this module gives the equations.

    A zero range counts as [-1, 1], so that its values, all zero, take the code of zero. (QuaRot's weight quantizer
    raises absmax, or the range, to 1e-5 instead: the same zeros, and a coarser grid than ours for groups below 1e-5.)

    Args:
        low: lower ends, at most zero if the zeros shall lie in 0..2^bits - 1.
        high: upper ends.
        bits: width of a code, 1 to 8; at least 2 on a symmetric grid.
        symmetry: which grid.

    Returns:
        Scales and zeros of the shape of `low`.

    Raises:
        FormatError: if no such grid exists.

    Example:
        >>> grid = fit_grid(jnp.array(-1.0), jnp.array(2.0), bits=2, symmetry="asymmetric")
        >>> float(grid.scales), float(grid.zeros)
        (1.0, 1.0)
    """
    _check(bits, symmetry)
    low, high = safe_scale(_compute(low), _compute(high), bits)
    if symmetry == "asymmetric":
        scales = (high - low) / (2**bits - 1)
        return Grid(scales, jnp.round(-low / scales))
    largest = jnp.maximum(jnp.abs(low), high)
    if symmetry == "symmetric":
        scales = largest / (2 ** (bits - 1) - 1)
    elif symmetry == "symmetric_full":
        scales = 2 * largest / (2**bits - 1)
    else:
        scales = largest / 2 ** (bits - 1)
    return Grid(scales, jnp.full_like(scales, 2 ** (bits - 1)))


def safe_scale(
    low: Float[Array, "*shape"], high: Float[Array, "*shape"], bits: int
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Replace a zero range by [-1, 1], so that the scale is a normal number and can be divided by.

    A range below 2^bits times the smallest normal number counts as zero as well: its scale would underflow.

    Args:
        low: lower ends.
        high: upper ends.
        bits: width of a code.

    Returns:
        The range, safe to fit a grid to.

    Example:
        >>> [float(end) for end in safe_scale(jnp.array(0.0), jnp.array(0.0), bits=4)]
        [-1.0, 1.0]
    """
    empty = jnp.maximum(jnp.abs(low), jnp.abs(high)) < 2**bits * jnp.finfo(low.dtype).tiny
    return jnp.where(empty, -1.0, low).astype(low.dtype), jnp.where(empty, 1.0, high).astype(high.dtype)


def expand(grid: Grid, axis: int) -> Grid:
    """Give a grid a unit axis, so that it broadcasts against values that still have the axis it was fitted over.

    Args:
        grid: grid whose arrays lack `axis`.
        axis: where to insert the unit axis.

    Returns:
        The same grid, one rank higher.

    Example:
        >>> expand(Grid(jnp.ones(3), jnp.zeros(3)), axis=0).scales.shape
        (1, 3)
    """
    return Grid(jnp.expand_dims(grid.scales, axis), jnp.expand_dims(grid.zeros, axis))


def encode(values: Float[Array, "*shape"], grid: Grid, bits: int) -> UInt8[Array, "*shape"]:
    """Round values to codes: clip(rne(x / s) + z, 0, 2^bits - 1), in the dtype of the grid.

    Args:
        values: array of any shape.
        grid: scales and zeros of the same rank, with 1 where one grid serves an axis (see `expand`).
        bits: width of a code, 1 to 8.

    Returns:
        Codes of the shape of `values`.

    Example:
        >>> grid = Grid(scales=jnp.array([0.5]), zeros=jnp.array([2.0]))
        >>> encode(jnp.array([-9.0, -0.5, 0.25, 0.3]), grid, bits=2).tolist()
        [0, 1, 2, 3]
    """
    return _round_to_level(values, grid, bits).astype(jnp.uint8)


def decode(codes: UInt8[Array, "*shape"], grid: Grid, dtype: DType = "float32") -> Float[Array, "*shape"]:
    """Return the values of codes: scales * (codes - zeros), computed in the dtype of the grid and cast once.

    Args:
        codes: codes of any shape.
        grid: scales and zeros of the same rank.
        dtype: dtype of the result.

    Returns:
        Values of the shape of `codes`.

    Example:
        >>> decode(jnp.array([0, 3], dtype=jnp.uint8), Grid(jnp.array([0.5]), jnp.array([2.0]))).tolist()
        [-1.0, 0.5]
    """
    return (grid.scales * (codes.astype(grid.scales.dtype) - grid.zeros)).astype(dtype)


@functools.partial(jax.jit, static_argnames=("bits", "symmetry", "norm", "steps"))
def search_range(
    values: Float[Array, "group *rest"],
    bits: int,
    symmetry: Symmetry,
    *,
    norm: float = SEARCH_NORM,
    steps: int = SEARCH_STEPS,
) -> Grid:
    """Search the shrunk range whose grid has the smallest error over the first axis.

    Try c = 1 - i / 100 for i = 0, 1, ..., steps - 1 and fit a grid to [c low, c high]; the error is sum |w - w_c|^norm.
    A strictly smaller error wins, so ties keep the larger range. A zero range gives the grid of `fit_grid`. (QuaRot
    raises absmax, and the asymmetric range, to 1e-5 before it divides; as in `fit_grid` we do not.)

    Args:
        values: one group along the first axis, independent groups along the others.
        bits: width of a code, 1 to 8.
        symmetry: which grid.
        norm: exponent of the error.
        steps: number of candidates, 1 (no search) to 100.

    Returns:
        Grid of the shape `[*rest]`.

    Raises:
        FormatError: if no such grid exists, or `steps` is not in 1..100.

    Example:
        >>> row = jnp.array([0.01, 0.02, -0.03, 0.5, 0.04, -0.02, 0.03, 0.011])
        >>> round(float(search_range(row, 4, "symmetric").scales), 6)  # 0.98 * 0.5 / 7
        0.07

    Reference:
        Frantar et al., GPTQ (2023), reference code; Ashkboos et al., QuaRot (2024), section 4.
    """
    if not 1 <= steps <= SEARCH_GRID:
        raise FormatError(
            f"{steps} steps given for the range search, which has 1 to {SEARCH_GRID}: choose `steps` there"
        )
    values = _compute(values)
    low, high = range_of(values, axis=0)

    def error_of(grid: Grid) -> Float[Array, "*rest"]:
        levels = _round_to_level(values, expand(grid, 0), bits)
        rounded = grid.scales[None] * (levels - grid.zeros[None])
        return jnp.sum(jnp.abs(rounded - values) ** norm, axis=0)

    def try_shrink(best: tuple[Grid, Array], shrink: Float[Array, ""]) -> tuple[tuple[Grid, Array], None]:
        grid = fit_grid(shrink * low, shrink * high, bits, symmetry)
        error = error_of(grid)
        better = error < best[1]
        chosen = Grid(*(jnp.where(better, new, old) for new, old in zip(grid, best[0], strict=True)))
        return (chosen, jnp.where(better, error, best[1])), None

    whole = fit_grid(low, high, bits, symmetry)
    shrinks = jnp.asarray([1 - step / SEARCH_GRID for step in range(1, steps)], dtype=values.dtype)
    (grid, _), _ = jax.lax.scan(try_shrink, (whole, error_of(whole)), shrinks)
    return grid


def cast_scales(grid: Grid, dtype: DType) -> Grid:
    """Round the scales to the dtype they will be stored in, and return them in the dtype of the grid.

    Encode with the result and the codes fit the stored scales. Zeros are kept. A scale that would round to zero becomes
    the smallest positive number of `dtype`; one too large becomes infinite, and the weight not finite.

    Args:
        grid: grid to round.
        dtype: dtype of storage.

    Returns:
        Grid whose scales `dtype` can hold exactly.

    Example:
        >>> float(cast_scales(Grid(jnp.array(0.1), jnp.array(8.0)), "float16").scales)
        0.0999755859375
    """
    return grid._replace(scales=as_stored(grid.scales, dtype, positive=True))


def as_stored(values: Float[Array, "*shape"], dtype: DType, *, positive: bool = False) -> Float[Array, "*shape"]:
    """Return what is left of values that are stored in `dtype`, in their own dtype; see `to_storage`.

    Args:
        values: numbers of any size.
        dtype: dtype of storage.
        positive: see `to_storage`.

    Returns:
        Values that `dtype` can hold exactly.

    Example:
        >>> float(as_stored(jnp.array(0.1), "float16"))
        0.0999755859375
    """
    return to_storage(values, dtype, positive=positive).astype(values.dtype)


def to_storage(values: Float[Array, "*shape"], dtype: DType, *, positive: bool = False) -> Float[Array, "*shape"]:
    """Round values to the dtype they are stored in, so that whoever reads them in this program has them rounded.

    XLA leaves a conversion to fewer bits and back out where it may, as on GPUs, so that what follows would use numbers
    that are not those stored; the barrier keeps both conversions.

    Args:
        values: numbers of any size.
        dtype: dtype of storage.
        positive: whether what is below the smallest positive number of `dtype` becomes that number, as of scales, by
            which is divided.

    Returns:
        Values in `dtype`.

    Example:
        >>> [float(to_storage(jnp.array(1e-9), "float16", positive=positive)) for positive in (False, True)]
        [0.0, 5.960464477539063e-08]
    """
    stored = values.astype(dtype)
    if positive:
        stored = jnp.maximum(stored, jnp.asarray(jnp.finfo(dtype).smallest_subnormal, dtype=dtype))
    return jax.lax.optimization_barrier(stored)


def straight_through(values: Float[Array, "*shape"], rounded: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return `rounded`, exactly, with the gradient of `values`.

    Args:
        values: what the gradient flows to.
        rounded: the forward value; it gets no gradient.

    Returns:
        Array equal to `rounded`.

    Example:
        >>> float(jax.grad(lambda x: straight_through(x, jnp.round(x)) ** 2)(jnp.array(1.6)))  # 2 * round(1.6)
        4.0

    Reference:
        Bengio et al., Estimating or propagating gradients through stochastic neurons (2013).
    """
    return jax.lax.stop_gradient(rounded) + (values - jax.lax.stop_gradient(values))


def _compute(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return values.astype(compute_dtype(values.dtype))


def _round_to_level(values: Shaped[Array, "*shape"], grid: Grid, bits: int) -> Float[Array, "*shape"]:
    levels = jnp.round(values.astype(grid.scales.dtype) / grid.scales) + grid.zeros
    return jnp.clip(levels, 0, 2**bits - 1)


def _check(bits: int, symmetry: Symmetry) -> None:
    fewest = 1 if symmetry == "asymmetric" else 2
    if not fewest <= bits <= 8:
        raise FormatError(
            f'{bits} bits given for a grid with symmetry "{symmetry}", which has {fewest} to 8: choose `bits` there'
        )
