"""What each kernel computes, in plain jax.numpy and float32: the meaning that its tests and benchmarks compare with.

    float activations    y[m, n] = sum_k x[m, k] * w[n, k]
    integer activations  y[m, n] = sum_k token_scales[m] * (x[m, k] - token_zeros[m]) * w[n, k]
    weights              w[n, k] = scales[k // g, n] * (codes[n, k] - zeros[k // g, n])

A weight lies [out, in], its inputs contiguous, because the tensor cores take int8 in that order only; g = in / groups,
and one group is "per channel". Codes are signed: a format's unsigned code less 2^(bits - 1), and its zero likewise.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


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
