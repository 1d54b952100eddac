"""Products whose kernels go on with what follows them: the residual stream and the next norm, or the gate."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float32

from jquant import kernels
from jquant.formats import JoinedPart, PreparedFloatTensor, UndividedActivation


def matmul_onto(
    x: Float[Array, "*batch in"],
    weight: PreparedFloatTensor,
    stream: Float32[Array, "*batch out"],
    scale: BFloat16[Array, "out"],
    eps: float,
) -> tuple[Float32[Array, "*batch out"], UndividedActivation]:
    """Adds a product to the residual stream and begins the norm of the sum, in the product's kernel.

    Args:
      x: activations, rounded to bfloat16.
      weight: prepared for kernels.
      stream: what is added to.
      scale: of the norm of the sum.
      eps: likewise.

    Returns:
      stream + x W, the product not rounded before, and the norm.

    Raises:
      ValueError: no kernel does so: see `onto_fault`.
    """
    *batch, inputs = x.shape
    rows = math.prod(batch)
    sums, numbers, squares = kernels.w4a16_onto(
        x.reshape(rows, inputs).astype(jnp.bfloat16), weight, stream.reshape(rows, -1), scale
    )
    return sums.reshape(stream.shape), UndividedActivation(numbers.reshape(stream.shape), squares, eps, "bfloat16")


def onto_fault(
    x: Float[Array, "*batch in"], weight: Any, stream: Float[Array, "*batch out"], scale: Float[Array, "out"]
) -> str | None:
    """Returns why `matmul_onto` has no kernel for a product; None where it has."""
    if not isinstance(weight, PreparedFloatTensor):
        return f"a {type(weight).__name__}, kernels that add to a stream have W4A16"
    if (stream.dtype, scale.dtype, x.dtype) != (jnp.float32, jnp.bfloat16, jnp.bfloat16):
        return f"{x.dtype} onto {stream.dtype} with a norm in {scale.dtype}, kernels add bfloat16 onto float32"
    if weight.codes.shape[0] != weight.shape[1]:
        return f"{weight.shape[1]} outputs, filled up to {weight.codes.shape[0]} for the kernels"
    if not x.size:
        return "no token"
    from pallas_kernels import FloatWeight, matmul_onto_fault

    operand = FloatWeight(weight.codes, weight.scales, weight.centers)
    return matmul_onto_fault(math.prod(x.shape[:-1]), operand, kernels.simulation(weight.layout))


def matmul_gated(
    x: Float[Array, "*batch in"] | UndividedActivation, weight: PreparedFloatTensor
) -> Float[Array, "*batch half"]:
    """Returns silu(gate) * up of the product with a joined weight, the gate's outputs before up's.

    The two are not rounded before: the result is, to bfloat16.

    Args:
      x: activations, rounded to bfloat16, or a norm that a kernel began.
      weight: prepared for kernels.

    Raises:
      ValueError: no kernel does so: see `gated_fault`.
    """
    numbers = x.numbers if isinstance(x, UndividedActivation) else x.astype(jnp.bfloat16)
    squares, eps = (x.squares, x.eps) if isinstance(x, UndividedActivation) else (None, 0.0)
    *batch, inputs = numbers.shape
    rows = numbers.reshape(math.prod(batch), inputs)
    return kernels.w4a16_gated(rows, squares, weight, eps=eps).reshape(*batch, weight.shape[1] // 2)


def gated_fault(x: Float[Array, "*batch in"] | UndividedActivation, gate: Any, up: Any) -> str | None:
    """Returns why `matmul_gated` has no kernel for the product with two weights; None where it has.

    >>> gated_fault(jnp.ones((1, 64)), jnp.ones((64, 64)), jnp.ones((64, 64)))
    'a ArrayImpl and a ArrayImpl, kernels that gate have joined W4A16'
    """
    if not isinstance(gate, PreparedFloatTensor) or not isinstance(up, JoinedPart):
        return f"a {type(gate).__name__} and a {type(up).__name__}, kernels that gate have joined W4A16"
    if gate.shape[1] != 2 * up.shape[1]:
        return f"{gate.shape[1] - up.shape[1]} outputs of the gate, {up.shape[1]} of up"
    if jnp.dtype(x.dtype) != jnp.bfloat16:
        return f"{x.dtype}, kernels that gate give bfloat16"
    numbers = x.numbers if isinstance(x, UndividedActivation) else x
    *batch, inputs = numbers.shape
    if numbers is not x and gate.codes.shape[1] != inputs:
        return f"{inputs} undivided inputs, filled up to {gate.codes.shape[1]} for the kernels"
    if not (tokens := math.prod(batch)):
        return "no token"
    from pallas_kernels import FloatWeight, matmul_gated_fault

    return matmul_gated_fault(tokens, FloatWeight(gate.codes, gate.scales, gate.centers))
