"""The products of `pallas_kernels` on rows of tokens and prepared weights, among which `jquant.matmul` chooses.

Each is jitted, so that layers of one shape share one kernel, traced and lowered once.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, Int, Int8, Shaped

from jquant.formats import (
    Layout,
    PreparedBinaryTensor,
    PreparedFloatTensor,
    PreparedIntegerTensor,
    PreparedSpqrTensor,
    PreparedWideTensor,
    padded_binary,
    padded_spqr,
)


@jax.jit
def w8a16(x: BFloat16[Array, "rows in"], weight: PreparedWideTensor) -> BFloat16[Array, "rows out"]:
    """Returns the product of the W8A16 kernel."""
    from pallas_kernels.wide import WideWeight, w8a16_decode

    operand = WideWeight(weight.codes, weight.scales)
    y = w8a16_decode(_pad_inputs(x, weight.codes), operand, simulate=simulation(weight.layout))
    return y[:, : weight.shape[1]]


@jax.jit
def w4a16(x: BFloat16[Array, "rows in"], weight: PreparedFloatTensor) -> BFloat16[Array, "rows out"]:
    """Returns the product of the W4A16 kernel that suits the number of rows."""
    from pallas_kernels import FloatWeight, w4a16_matmul

    padded = _pad_inputs(x, weight.codes)
    operand = FloatWeight(weight.codes, weight.scales, weight.centers)
    return w4a16_matmul(padded, operand, simulate=simulation(weight.layout))[:, : weight.shape[1]]


@partial(jax.jit, static_argnames="eps")
def w4a16_undivided(
    numbers: BFloat16[Array, "rows in"],
    squares: Float32[Array, "runs columns"],
    weight: PreparedFloatTensor,
    *,
    eps: float,
) -> BFloat16[Array, "rows out"]:
    """Returns the product of rows that the W4A16 kernel divides."""
    from pallas_kernels import FloatWeight, Undivided, w4a16_matmul_undivided

    x, operand = Undivided(numbers, squares), FloatWeight(weight.codes, weight.scales, weight.centers)
    return w4a16_matmul_undivided(x, operand, eps=eps, simulate=simulation(weight.layout))[:, : weight.shape[1]]


@jax.jit
def w4a16_onto(
    x: BFloat16[Array, "rows in"],
    weight: PreparedFloatTensor,
    stream: Float32[Array, "rows out"],
    scale: BFloat16[Array, "out"],
) -> tuple[Float32[Array, "rows out"], BFloat16[Array, "rows out"], Float32[Array, "runs columns"]]:
    """Returns the sum of the stream and the product, and numbers and squares of its undivided norm."""
    from pallas_kernels import FloatWeight, w4a16_matmul_onto

    padded, operand = _pad_inputs(x, weight.codes), FloatWeight(weight.codes, weight.scales, weight.centers)
    sums, normed = w4a16_matmul_onto(padded, operand, stream, scale, simulate=simulation(weight.layout))
    return sums, *normed


@partial(jax.jit, static_argnames="eps")
def w4a16_gated(
    numbers: BFloat16[Array, "rows in"],
    squares: Float32[Array, "runs columns"] | None,
    weight: PreparedFloatTensor,
    *,
    eps: float,
) -> BFloat16[Array, "rows half"]:
    """Returns silu(gate) * up of a joined weight's product, of rows that the W4A16 kernel divides where squares are."""
    from pallas_kernels import FloatWeight, Undivided, w4a16_matmul_gated

    operand = FloatWeight(weight.codes, weight.scales, weight.centers)
    x = _pad_inputs(numbers, weight.codes) if squares is None else Undivided(numbers, squares)
    return w4a16_matmul_gated(x, operand, eps=eps, simulate=simulation(weight.layout))


@jax.jit
def integers(
    codes: Int8[Array, "rows in"],
    scales: Float32[Array, "rows"],
    zeros: Float32[Array, "rows"] | None,
    outliers: tuple[BFloat16[Array, "rows kept"], Int[Array, "kept"]] | None,
    weight: PreparedIntegerTensor,
) -> BFloat16[Array, "rows out"]:
    """Returns the product of the W4A8 or W8A8 kernel."""
    from pallas_kernels import IntegerWeight, integer_matmul

    padded = _pad_inputs(codes, weight.codes)
    operand = IntegerWeight(weight.codes, weight.scales, weight.sums, weight.zeros)
    y = integer_matmul(padded, scales, zeros, operand, outliers, simulate=simulation(weight.layout))
    return y[:, : weight.shape[1]]


@jax.jit
def narrow(
    x: BFloat16[Array, "rows in"], weight: PreparedBinaryTensor | PreparedSpqrTensor
) -> BFloat16[Array, "rows out"]:
    """Returns the product of the kernel of the weight's format."""
    from pallas_kernels import binary_decode, spqr_decode
    from pallas_kernels.configs import BINARY_KINDS, choose_narrow

    (inputs, outputs), simulate = weight.shape, simulation(weight.layout)
    if isinstance(weight, PreparedSpqrTensor):
        wide, tall = padded_spqr(weight.shape)
        operands = weight.codes, weight.grid_codes, weight.grids, weight.values, weight.rows
        config = choose_narrow("spqr3", len(x), tall, wide, weight.grid_codes.shape[1])
        y = spqr_decode(jnp.pad(x, ((0, 0), (0, wide - inputs))), *operands, config=config, simulate=simulate)
    else:
        wide, tall = padded_binary(weight.format, weight.shape)
        kind = BINARY_KINDS[weight.format.bits - 2]
        config = choose_narrow(kind, len(x), tall, wide, len(weight.alphas))
        x = jnp.pad(x, ((0, 0), (0, wide - inputs)))
        y = binary_decode(x, weight.signs, weight.alphas, weight.offsets, config=config, simulate=simulate)
    return y[:, :outputs]


def _pad_inputs(x: Shaped[Array, "rows in"], codes: Int[Array, "out padded"]) -> Shaped[Array, "rows padded"]:
    return jnp.pad(x, ((0, 0), (0, codes.shape[1] - x.shape[1])))


def simulation(layout: Layout) -> Any:
    """Returns what makes a kernel run in the interpreter; None where the GPU shall run it."""
    from pallas_kernels.compat import Simulation

    return Simulation() if layout is Layout.SIMULATED else None
