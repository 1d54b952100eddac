"""Uniform grids that begin at the least value: x ~ scales * codes + lows, the float-zero form of KV caches.

    s = max(max - min, 1e-5) / (2^b - 1),   code = clip(rne((x - min) / s), 0, 2^b - 1),   x' = s code + min

Unlike the grids of `jquant.numerics.rounding` the range need not hold zero, and the low end is a float: it costs the
width of a scale instead of a code, and no level is lost to values that do not occur. KIVI (arXiv:2402.02750) and the
INT4 cache of QuaRot (arXiv:2404.00456) store keys and values like this. The published KIVI divides by a range that may
be zero; the bound is QuaRot's.
"""

from typing import Final, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jquant.errors import FormatError
from jquant.numerics.rounding import to_storage
from jquant.types import DType, Leaf, compute_dtype

LEAST_RANGE: Final = 1e-5  # QuaRot's runtime: narrower groups count as this wide, so a constant one comes back exactly


class OffsetGrid(NamedTuple):
    """Hold a grid x = scales * codes + lows: two float arrays of one shape, in the dtype that they are stored in."""

    scales: Leaf
    lows: Leaf


def fit_offset_grid(values: Float[Array, "*batch group"], bits: int, dtype: DType = "float16") -> OffsetGrid:
    """Fit a grid to each group along the last axis.

    Args:
        values: groups.
        bits: width of a code, 1 to 8.
        dtype: dtype of storage; what `encode_offset` computes with is what is stored.

    Returns:
        Scales and lows, `[*batch, 1]`, of `dtype`.

    Raises:
        FormatError: if `bits` is not in 1..8.

    Example:
        >>> grid = fit_offset_grid(jnp.array([0.1, -0.7, 1.4, 3.2]), bits=2, dtype="float32")
        >>> [round(float(end.item()), 6) for end in grid]
        [1.3, -0.7]
    """
    if not 1 <= bits <= 8:
        raise FormatError(f"{bits} bits given for a grid with a float offset, which has 1 to 8: choose `bits` there")
    wide = values.astype(compute_dtype(values.dtype))
    low, high = jnp.min(wide, axis=-1, keepdims=True), jnp.max(wide, axis=-1, keepdims=True)
    scales = jnp.maximum(high - low, LEAST_RANGE) / (2**bits - 1)
    return OffsetGrid(to_storage(scales, dtype, positive=True), to_storage(low, dtype))


def encode_offset(values: Float[Array, "*batch group"], grid: OffsetGrid, bits: int) -> UInt8[Array, "*batch group"]:
    """Round values to codes: clip(rne((x - low) / s), 0, 2^bits - 1).

    Args:
        values: groups along the last axis.
        grid: `[*batch, 1]`.
        bits: width of a code.

    Example:
        >>> grid = OffsetGrid(jnp.array([1.3]), jnp.array([-0.7]))
        >>> encode_offset(jnp.array([0.1, -0.7, 1.4, 3.2]), grid, bits=2).tolist()
        [1, 0, 2, 3]
    """
    wide = compute_dtype(values.dtype)
    scales, lows = (jnp.broadcast_to(end.astype(wide), values.shape) for end in grid)
    return jnp.clip(jnp.round((values.astype(wide) - lows) / scales), 0, 2**bits - 1).astype(jnp.uint8)


def decode_offset(
    codes: UInt8[Array, "*batch group"], grid: OffsetGrid, dtype: DType = "float32"
) -> Float[Array, "*batch group"]:
    """Return the values of codes: scales * codes + lows, computed in float32 or wider and rounded once to `dtype`.

    Example:
        >>> decode_offset(jnp.array([0, 3], dtype=jnp.uint8), OffsetGrid(jnp.array([0.5]), jnp.array([2.0]))).tolist()
        [2.0, 3.5]
    """
    wide = compute_dtype(dtype)
    scales, lows = (jnp.broadcast_to(end.astype(wide), codes.shape) for end in grid)
    return (scales * codes.astype(wide) + lows).astype(dtype)
