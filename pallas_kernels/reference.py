"""What each kernel computes, in plain jax.numpy and float32: the meaning that its tests and benchmarks compare with.

    float activations    y[m, n] = sum_k x[m, k] * w[n, k]
    gate and up          y[m, n] = silu(p[m, n]) * p[m, half + n],    p what float activations give
    integer activations  y[m, n] = sum_k token_scales[m] * (x[m, k] - token_zeros[m]) * w[n, k]
    weights              w[n, k] = scales[k // g, n] * (codes[n, k] - zeros[k // g, n])

    rotation             y = M x / sqrt(order), quantized on each token's own grid
    feedback             row j rounds P_j - sum_{i < j} F_ij c_i, c_i what rounding row i changed

A weight lies [out, in], its inputs contiguous, because the tensor cores take int8 in that order only; g = in / groups,
and one group is "per channel". Codes are signed: a format's unsigned code less 2^(bits - 1), and its zero likewise.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int8, Integer, Shaped


def dense_weight(
    codes: Int[Array, "out in"], scales: Shaped[Array, "groups out"], zeros: Shaped[Array, "groups out"] | None = None
) -> Float[Array, "out in"]:
    """Returns the float32 weight that codes on grids stand for.

    Args:
      codes: signed integers, int4 or int8.
      scales: the grids' steps.
      zeros: the signed codes that stand for 0; None where all are 0.

    Example:
      >>> codes = jnp.array([[3, -1]], jnp.int8)
      >>> dense_weight(codes, jnp.array([[0.5], [2.0]]), jnp.array([[1.0], [0.0]])).tolist()
      [[1.0, -2.0]]
    """
    outputs, inputs = codes.shape
    groups = scales.shape[0]
    values = codes.astype(jnp.float32).reshape(outputs, groups, inputs // groups)
    if zeros is not None:
        values = values - zeros.astype(jnp.float32).T[:, :, None]
    return (values * scales.astype(jnp.float32).T[:, :, None]).reshape(outputs, inputs)


def float_matmul(
    x: Float[Array, "tokens in"],
    codes: Int[Array, "out in"],
    scales: Shaped[Array, "groups out"],
    zeros: Shaped[Array, "groups out"] | None = None,
) -> Float[Array, "tokens out"]:
    """Returns x @ w.T in float32: what W4A16 kernels compute up to the rounding of their bfloat16 operands.

    Example:
      >>> float_matmul(jnp.array([[1.0, 2.0]]), jnp.array([[3, -1]], jnp.int8), jnp.array([[0.5]])).tolist()
      [[0.5]]
    """
    weight = dense_weight(codes, scales, zeros)
    return jnp.dot(x.astype(jnp.float32), weight.T, precision=jax.lax.Precision.HIGHEST)


def gated_matmul(
    x: Float[Array, "tokens in"],
    codes: Int[Array, "out in"],
    scales: Shaped[Array, "groups out"],
    zeros: Shaped[Array, "groups out"] | None = None,
) -> Float[Array, "tokens half"]:
    """Returns silu(gate) * up, the halves of `float_matmul`, in float32.

    Example:
      >>> gated_matmul(jnp.array([[1.0]]), jnp.array([[50], [3]], jnp.int8), jnp.ones((1, 2))).tolist()
      [[150.0]]
    """
    gate, up = jnp.split(float_matmul(x, codes, scales, zeros), 2, axis=1)
    return gate / (1 + jnp.exp(-gate)) * up


def integer_matmul(
    x: Int[Array, "tokens in"],
    token_scales: Float[Array, "tokens"],
    token_zeros: Float[Array, "tokens"] | None,
    codes: Int[Array, "out in"],
    scales: Float[Array, "out"],
) -> Float[Array, "tokens out"]:
    """Returns the product of integers, exact in int32, with the scales after: W8A8, W4A8 and W4A4.

    Args:
      x: the activations' int8 codes (4-bit codes are int8 too).
      token_scales: the step of each token's grid.
      token_zeros: the code that stands for 0, a whole number for each token; None where all are 0.
      codes: signed integers.
      scales: the step of each output's grid.

    Example:
      >>> x, codes, one = jnp.array([[3, 4]], jnp.int8), jnp.array([[1, 2]], jnp.int8), jnp.ones(1)
      >>> integer_matmul(x, 0.5 * one, one, codes, one).tolist()
      [[4.0]]
    """
    contract = (((1,), (1,)), ((), ()))
    sums = jax.lax.dot_general(x, codes.astype(jnp.int8), contract, preferred_element_type=jnp.int32)
    values = sums.astype(jnp.float32)
    if token_zeros is not None:
        of_output = jnp.sum(codes.astype(jnp.int32), axis=1).astype(jnp.float32)
        values = values - token_zeros[:, None] * of_output[None]
    return values * token_scales[:, None] * scales[None]


def rotate_quantize(
    x: Float[Array, "tokens n"],
    rotation: Shaped[Array, "n n"],
    order: int,
    bits: int,
    clip_ratio: float = 1.0,
    symmetry: Literal["symmetric", "asymmetric"] = "symmetric",
) -> tuple[Int8[Array, "tokens n"], Float[Array, "tokens"], Float[Array, "tokens"] | None]:
    """Returns codes, scales and (of an asymmetric grid) zeros of each token's rotated numbers.

    Args:
      x: activations.
      rotation: the whole matrix of -1, 0 and 1.
      order: how many numbers it mixes; the rotation is the matrix over its root.
      bits: of a code.
      clip_ratio: share of the range that the grid covers.
      symmetry: which grid.

    Example:
      >>> turn = jnp.array([[1.0, 1.0], [1.0, -1.0]])
      >>> rotate_quantize(jnp.array([[3.0, 4.0]]), turn, 2, 8)[0].tolist()
      [[127, -18]]
    """
    y = jnp.dot(x.astype(jnp.float32), rotation.T.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    y = y / jnp.sqrt(jnp.float32(order))
    half = 2 ** (bits - 1)
    if symmetry == "symmetric":
        largest = clip_ratio * jnp.max(jnp.abs(y), axis=1)
        scales = jnp.where(largest == 0, 1.0, largest) / (half - 1)  # a token of zeros counts as [-1, 1]
        return jnp.clip(jnp.round(y / scales[:, None]), -half, half - 1).astype(jnp.int8), scales, None
    low, high = clip_ratio * jnp.minimum(jnp.min(y, axis=1), 0), clip_ratio * jnp.maximum(jnp.max(y, axis=1), 0)
    low, high = jnp.where(low == high, -1.0, low), jnp.where(low == high, 1.0, high)
    scales = (high - low) / (2 * half - 1)
    zeros = jnp.round(-low / scales) - half
    codes = jnp.round(y / scales[:, None]) + zeros[:, None]
    return jnp.clip(codes, -half, half - 1).astype(jnp.int8), scales, zeros


def binary_weight(
    codes: Int[Array, "out in"],
    alphas: Float[Array, "groups bits out"],
    offsets: Float[Array, "groups out"] | None = None,
) -> Float[Array, "out in"]:
    """Returns the float32 weight that binary codes stand for: offset + sum_p +-alpha_p, + where bit p of a code is 1.

    Example:
      >>> binary_weight(jnp.array([[3, 1, 0]], jnp.int8), jnp.array([[[1.0], [0.25]]])).tolist()
      [[1.25, 0.75, -1.25]]
    """
    outputs, inputs = codes.shape
    groups, bits, _ = alphas.shape
    apart = codes.reshape(outputs, groups, inputs // groups)
    weight = jnp.zeros(apart.shape) if offsets is None else _spread(offsets, apart.shape)
    for plane in range(bits):
        alpha = _spread(alphas[:, plane], apart.shape)
        weight = weight + jnp.where((apart >> plane) & 1 == 1, alpha, -alpha)
    return weight.reshape(outputs, inputs)


def add_norm(
    x: Float32[Array, "rows n"], update: Float[Array, "rows n"] | None, scale: Float[Array, "n"], eps: float
) -> tuple[Float32[Array, "rows n"], Float[Array, "rows n"]]:
    """Returns sum = x + update and scale * sum / sqrt(mean(sum^2) + eps), the norm rounded once to the scale's dtype.

    Example:
      >>> _, normed = add_norm(jnp.full((1, 2), 3.0), jnp.ones((1, 2)), jnp.full(2, 0.5), 0.0)
      >>> normed.tolist()
      [[0.5, 0.5]]
    """
    sums = x if update is None else x + update.astype(jnp.float32)
    normed = sums / jnp.sqrt(jnp.mean(sums * sums, axis=1, keepdims=True) + eps)
    return sums, (normed * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)).astype(scale.dtype)


def _spread(of_groups: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(of_groups.astype(jnp.float32).T[:, :, None], shape)


def spqr_weight(
    codes: Int[Array, "out in"],
    scale_codes: Int[Array, "groups out"],
    zero_codes: Int[Array, "groups out"],
    parts: Float[Array, "4 groups runs"],
    values: Float[Array, "out slots"] | None = None,
    rows: Integer[Array, "out slots"] | None = None,
) -> Float[Array, "out in"]:
    """Returns the float32 weight of SpQR's codes under two-level grids, and of what its slots add.

    Args:
      codes: 0 to 7.
      scale_codes: 0 to 15.
      zero_codes: 0 to 15.
      parts: the scales' base and step and the zeros', of runs of outputs.
      values: what is added in each slot.
      rows: where.
    """
    shared = scale_codes.shape[1] // parts.shape[2]
    scale_base, scale_step, zero_base, zero_step = jnp.repeat(parts.astype(jnp.float32), shared, axis=2)
    scales = scale_base + scale_step * scale_codes.astype(jnp.float32)
    zeros = zero_base + zero_step * zero_codes.astype(jnp.float32)
    weight = dense_weight(codes, scales, zeros)
    if values is None or rows is None:
        return weight
    return weight.at[jnp.arange(len(codes))[:, None], rows].add(values.astype(jnp.float32))


def round_on_grids(
    rows: Float[Array, "rows out"],
    factor: Float[Array, "rows rows"],
    groups: Int[Array, "rows"],
    scales: Float[Array, "groups out"],
    zeros: Float[Array, "groups out"],
    bits: int,
) -> tuple[Shaped[Array, "rows out"], Float[Array, "rows out"]]:
    """Returns the codes of rows that are rounded in turn, each one's error fed back to those below, and the errors.

    Example:
      >>> factor, grid = jnp.array([[1.0, 0.5], [0.0, 1.0]]), jnp.ones((1, 1))
      >>> codes, errors = round_on_grids(jnp.array([[1.4], [1.4]]), factor, jnp.zeros(2, jnp.int32), grid, 0 * grid, 2)
      >>> codes.ravel().tolist(), errors.ravel().round(3).tolist()
      ([1, 1], [0.4000000059604645, 0.20000000298023224])
    """

    def apply(values: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale, zero = scales[groups[row]], zeros[groups[row]]
        codes = jnp.clip(jnp.round(values / scale) + zero, 0, 2**bits - 1)
        return codes.astype(jnp.uint8), (values - scale * (codes - zero)) / factor[row, row]

    codes, errors = _feed_back(rows, factor, apply)
    return codes, errors


def round_with_outliers(
    rows: Float[Array, "rows out"],
    factor: Float[Array, "rows rows"],
    counts: Float[Array, "rows"],
    limit: Float[Array, ""],
    scales: Float[Array, "out"],
    zeros: Float[Array, "out"],
    bits: int,
    dtype: jax.typing.DTypeLike,
) -> tuple[Shaped[Array, "rows out"], ...]:
    """Returns codes, outliers (1 or 0), what stands for the weights, and errors, of rows that SpQR rounds in turn."""

    def nearest(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes = jnp.clip(jnp.round(values / jnp.where(scales > 0, scales, 1.0) + zeros), 0, 2**bits - 1)
        return codes, scales * (codes - zeros)

    def apply(values: jax.Array, row: jax.Array) -> tuple[jax.Array, ...]:
        told = ((values - nearest(values)[1]) * counts[row]) ** 2 > limit
        codes, rounded = nearest(jnp.where(told, 0.0, values))
        stored = jax.lax.optimization_barrier(values.astype(dtype))  # XLA would leave the two conversions out on a GPU
        dense = jnp.where(told, stored.astype(jnp.float32), rounded)
        return codes.astype(jnp.uint8), told.astype(jnp.uint8), dense, (values - dense) / factor[row, row]

    return _feed_back(rows, factor, apply)


def round_to_steps(
    rows: Float[Array, "rows out"],
    feedback: Float[Array, "rows rows"],
    ends: Float[Array, "2"],
    last: Float[Array, "rows out"],
    noise: Float[Array, "rows out"] | None,
) -> Float[Array, "rows out"]:
    """Returns whole numbers of rows rounded in turn, each one's change of the last sweep's fed back to those below."""

    def apply(values: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        rounded = jnp.round(values) if noise is None else jnp.floor(values + noise[row])
        codes = jnp.clip(rounded, ends[0], ends[1])
        return codes, codes - last[row]

    return _feed_back(rows, feedback, apply)[0]


def _feed_back(rows: jax.Array, factor: jax.Array, apply: Callable[..., tuple[jax.Array, ...]]) -> tuple[Any, ...]:
    """Rounds rows in turn; what `apply` gives last, times the factor's row, goes from those below."""

    def step(rows: jax.Array, row: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        kept = apply(rows[row], row)
        return rows - factor[row][:, None] * kept[-1][None, :], kept

    found: tuple[Any, ...] = jax.lax.scan(step, rows, jnp.arange(rows.shape[0]))[1]
    return found
