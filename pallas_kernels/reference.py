"""What each kernel computes, in plain jax.numpy and float32: the meaning that its tests and benchmarks compare with.

    float activations    y[m, n] = sum_k x[m, k] * w[n, k]
    integer activations  y[m, n] = sum_k token_scales[m] * (x[m, k] - token_zeros[m]) * w[n, k]
    weights              w[n, k] = scales[k // g, n] * (codes[n, k] - zeros[k // g, n])

    rotation             y = M x / sqrt(order), quantized on each token's own grid

A weight lies [out, in], its inputs contiguous, because the tensor cores take int8 in that order only; g = in / groups,
and one group is "per channel". Codes are signed: a format's unsigned code less 2^(bits - 1), and its zero likewise.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, Integer, Shaped


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
