"""What the kernels read: weights prepared once, exactly, and the way back.

    w[n, k] = scales[k // g, n] * (codes[n, k] - zeros[k // g, n])

`prepare_int4` permutes the codes for the operand's type (`order`); W4A16 keeps the zeros as centers = 136 + zeros,
what unpacking subtracts, and integer products keep each row's sum, by which tokens' zeros are corrected, and int8 ones
the weight's own zeros:

    sum_k (x[m, k] - z[m]) * w[n, k] = scales[n] * (sum_k x[m, k] * codes[n, k] - zeros[n] * sum_k x[m, k])
                                       - z[m] * sums[n],    sums[n] = sum_k w[n, k]
"""

from typing import Final, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float16, Float32, Int, Int8, Shaped

from pallas_kernels.order import RUN, stored_bf16, stored_int8

type Scales = BFloat16[Array, "groups out"] | Float16[Array, "groups out"]

CENTER: Final = 136  # what an unpacked int4 code is above itself: 128 + 8


class FloatWeight(NamedTuple):
    """An int4 weight for bfloat16 activations.

    Attributes:
      codes: int4 [out, in] in the order of `stored_bf16`.
      scales: float16 or bfloat16 [groups, out].
      centers: 136 + zeros, bfloat16 [groups, out]; None where all zeros are 0.
    """

    codes: Int[Array, "out in"]
    scales: Scales
    centers: BFloat16[Array, "groups out"] | None


class IntegerWeight(NamedTuple):
    """An int4 or int8 weight for int8 activations.

    Attributes:
      codes: int4 [out, in] in the order of `stored_int8`, or int8 as it is.
      scales: float32 [groups, out].
      sums: float32 [out], the sums of the weight over its inputs.
      zeros: float32 [1, out] for int8 codes, whole numbers; None where all are 0.
    """

    codes: Int[Array, "out in"]
    scales: Float32[Array, "groups out"]
    sums: Float32[Array, "out"]
    zeros: Float32[Array, "1 out"] | None = None


def prepare_w4a16(
    codes: Int[Array, "out in"], scales: Float[Array, "groups out"], zeros: Shaped[Array, "groups out"] | None = None
) -> FloatWeight:
    """Returns the weight as W4A16 kernels read it; exact but for scales in float32, which are rounded to bfloat16.

    Args:
      codes: int4, or int8 between -8 and 7.
      scales: the groups' steps; float16 and bfloat16 are kept. Kernels of few tokens multiply sums by them in float32,
        those of many multiply weights by them in bfloat16.
      zeros: whole numbers between -8 and 7, the codes that stand for 0; None where all are 0.

    Raises:
      ValueError: the number of inputs is no multiple of 32, or the groups do not divide it.

    Example:
      >>> weight = prepare_w4a16(jnp.ones((64, 64), jnp.int4), jnp.ones((1, 64)), jnp.full((1, 64), -2.0))
      >>> weight.codes.dtype.name, float(weight.centers[0, 0])
      ('int4', 134.0)
    """
    _check(codes, scales)
    centers = None if zeros is None else (zeros.astype(jnp.float32) + CENTER).astype(jnp.bfloat16)
    kept = scales if scales.dtype.itemsize == 2 else scales.astype(jnp.bfloat16)
    return FloatWeight(stored_bf16.apply(codes.astype(jnp.int4)), kept, centers)


def restore_w4a16(
    weight: FloatWeight,
) -> tuple[Int[Array, "out in"], Scales, Float32[Array, "groups out"] | None]:
    """Returns the codes, scales and zeros that `prepare_w4a16` was given, the scales as rounded there."""
    zeros = None if weight.centers is None else weight.centers.astype(jnp.float32) - CENTER
    return stored_bf16.invert(weight.codes), weight.scales, zeros


def prepare_w4a8(codes: Int[Array, "out in"], scales: Float[Array, "groups out"]) -> IntegerWeight:
    """Returns the weight as W4A8 kernels read it; W4A4 is the same, its activations' codes kept in int8.

    Args:
      codes: int4, or int8 between -8 and 7.
      scales: the groups' steps; one group is "per channel", the only one that kernels of many tokens take.

    Raises:
      ValueError: the number of inputs is no multiple of 32, or the groups do not divide it.
    """
    _check(codes, scales)
    stored = stored_int8.apply(codes.astype(jnp.int4))
    return IntegerWeight(stored, scales.astype(jnp.float32), _sums(codes, scales))


def prepare_w8a8(
    codes: Int8[Array, "out in"], scales: Float[Array, "1 out"], zeros: Shaped[Array, "1 out"] | None = None
) -> IntegerWeight:
    """Returns the weight as W8A8 kernels read it: its codes as they are.

    Args:
      codes: int8.
      scales: each output's step.
      zeros: whole numbers, the codes that stand for 0; None where all are 0.
    """
    scales, sums = scales.astype(jnp.float32), _sums(codes, scales)
    if zeros is not None:
        zeros = zeros.astype(jnp.float32)
        sums = sums - codes.shape[1] * (zeros * scales)[0]
    return IntegerWeight(codes, scales, sums, zeros)


def restore_integer(weight: IntegerWeight) -> tuple[Int[Array, "out in"], Float32[Array, "groups out"]]:
    """Returns the codes and scales that `prepare_w4a8` or `prepare_w8a8` was given; zeros are in the weight as such."""
    codes = stored_int8.invert(weight.codes) if weight.codes.dtype == jnp.int4 else weight.codes
    return codes, weight.scales


def _sums(codes: Int[Array, "out in"], scales: Float[Array, "groups out"]) -> Float32[Array, "out"]:
    groups = scales.shape[0]
    sums = codes.astype(jnp.int32).reshape(codes.shape[0], groups, -1).sum(-1)  # [out, groups], exact
    return jnp.sum(sums.astype(jnp.float32) * scales.astype(jnp.float32).T, axis=1)


def _check(codes: Int[Array, "out in"], scales: Float[Array, "groups out"]) -> None:
    inputs, groups = codes.shape[1], scales.shape[0]
    if inputs % RUN or inputs % groups:
        raise ValueError(
            f"a weight [out, in] of {inputs} inputs in {groups} groups: kernels want a multiple of {RUN} inputs, in "
            "groups of one size; pad the inputs or keep the portable layout"
        )
