"""The products by name: each takes raw arrays and a prepared weight, and chooses kernel and configuration by shape."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, Int, Int8

from pallas_kernels import configs
from pallas_kernels.compat import ROWS_OF_ACCUMULATOR, Simulation
from pallas_kernels.decode import w4a8_decode, w4a16_decode, w4a16_onto
from pallas_kernels.decode_config import DecodeConfig
from pallas_kernels.decode_rules import MANY_OF_FEW
from pallas_kernels.prefill import PrefillConfig, fitting, integer_prefill, w4a16_prefill
from pallas_kernels.residual import Undivided
from pallas_kernels.weights import FloatWeight, IntegerWeight


def w4a16_matmul(
    x: BFloat16[Array, "tokens in"],
    weight: FloatWeight,
    *,
    config: configs.Config | None = None,
    simulate: Simulation | None = None,
) -> BFloat16[Array, "tokens out"]:
    """Multiplies bfloat16 activations by an int4 weight: `reference.float_matmul` up to rounding.

    Args:
      x: activations.
      weight: what `prepare_w4a16` returned.
      config: how the work is divided; None for `configs.choose`.
      simulate: run in the interpreter on the CPU with these settings; None on an H100 or H200.

    Raises:
      ValueError: no kernel multiplies this shape.
    """
    outputs, inputs = weight.codes.shape
    chosen = config or _choose("w4a16", (x.shape[0], outputs, inputs), weight.scales.shape[0], simulate)
    if isinstance(chosen, DecodeConfig):
        return w4a16_decode(x, weight.codes, weight.scales, weight.centers, config=chosen, simulate=simulate)
    return w4a16_prefill(x, weight.codes, weight.scales, weight.centers, config=chosen, simulate=simulate)


def w4a16_matmul_undivided(
    x: Undivided, weight: FloatWeight, *, eps: float, simulate: Simulation | None = None
) -> BFloat16[Array, "tokens out"]:
    """Multiplies a norm whose tokens are not divided: `reference.float_matmul` of what it stands for, up to rounding.

    Args:
      x: what `w4a16_matmul_onto` returned.
      weight: what `prepare_w4a16` returned.
      eps: of the norm.
      simulate: run in the interpreter on the CPU with these settings; None on an H100 or H200.

    Raises:
      ValueError: no kernel of few tokens multiplies this shape.
    """
    (tokens, inputs), groups = x.numbers.shape, weight.scales.shape[0]
    chosen = _choose("w4a16", (tokens, weight.codes.shape[0], inputs), groups, simulate)
    if not isinstance(chosen, DecodeConfig):
        raise ValueError(f"{tokens} undivided tokens: kernels of few tokens divide, {chosen} is none; divide before")
    codes, scales, centers = weight
    return w4a16_decode(x.numbers, codes, scales, centers, squares=x.squares, eps=eps, config=chosen, simulate=simulate)


def w4a16_matmul_onto(
    x: BFloat16[Array, "tokens in"],
    weight: FloatWeight,
    stream: Float32[Array, "tokens out"],
    scale: BFloat16[Array, "out"],
    *,
    simulate: Simulation | None = None,
) -> tuple[Float32[Array, "tokens out"], Undivided]:
    """Adds a product to the residual stream: `reference.add_norm` of it, but for the division by the root of the mean.

    Args:
      x: activations.
      weight: what `prepare_w4a16` returned.
      stream: what is added to.
      scale: of the norm of the sum.
      simulate: run in the interpreter on the CPU with these settings; None on an H100 or H200.

    Raises:
      ValueError: no kernel does so with this shape: see `matmul_onto_fault`.
    """
    fault = matmul_onto_fault(x.shape[0], weight, simulate)
    if fault:
        raise ValueError(f"{x.shape[0]} tokens times {weight.codes.shape} onto a stream: {fault}; use `norm.add_norm`")
    config = _onto_config(x.shape[0], weight, simulate)
    return w4a16_onto(x, *weight, stream, scale, config=config, simulate=simulate)


def matmul_onto_fault(tokens: int, weight: FloatWeight, simulate: Simulation | None = None) -> str | None:
    """Returns why `w4a16_matmul_onto` has no kernel for a product; None where it has.

    >>> matmul_onto_fault(17, FloatWeight(jnp.zeros((4096, 64), jnp.int4), jnp.ones((1, 4096)), None))
    '17 tokens, kernels that add to a stream take 16'
    """
    if tokens > MANY_OF_FEW:
        return f"{tokens} tokens, kernels that add to a stream take {MANY_OF_FEW}"
    config = _onto_config(tokens, weight, simulate)
    return f"XLA adds the {config.splits} splits" if config.splits > 1 and not config.cluster else None


def w4a16_matmul_gated(
    x: BFloat16[Array, "tokens in"] | Undivided,
    weight: FloatWeight,
    *,
    eps: float = 0.0,
    simulate: Simulation | None = None,
) -> BFloat16[Array, "tokens half"]:
    """Multiplies by the gate's weight and up's, joined, and gates: `reference.gated_matmul` up to the last rounding.

        y = silu(gate) * up,    gate and up the product's halves, float32

    Args:
      x: activations, or a norm that `w4a16_matmul_onto` returned.
      weight: what `prepare_w4a16` returned, the gate's outputs before up's.
      eps: of that norm.
      simulate: run in the interpreter on the CPU with these settings; None on an H100 or H200.

    Raises:
      ValueError: no kernel does so with this shape: see `matmul_gated_fault`.
    """
    numbers, squares = x if isinstance(x, Undivided) else (x, None)
    fault = matmul_gated_fault(numbers.shape[0], weight)
    if fault:
        raise ValueError(f"{numbers.shape[0]} tokens times {weight.codes.shape}, gated: {fault}; gate the product")
    (tokens, inputs), (outputs, _) = numbers.shape, weight.codes.shape
    config = _one_split(configs.choose_gated(tokens, outputs, inputs, weight.scales.shape[0]), simulate)
    return w4a16_decode(numbers, *weight, squares=squares, eps=eps, gated=True, config=config, simulate=simulate)


def matmul_gated_fault(tokens: int, weight: FloatWeight) -> str | None:
    """Returns why `w4a16_matmul_gated` has no kernel for a product; None where it has.

    >>> matmul_gated_fault(1, FloatWeight(jnp.zeros((192, 64), jnp.int4), jnp.ones((1, 192)), None))
    '192 outputs, kernels that gate take a multiple of 128: 64 of the gate and as many of up'
    """
    if tokens > MANY_OF_FEW:
        return f"{tokens} tokens, kernels that gate take {MANY_OF_FEW}"
    rows, outputs = 2 * ROWS_OF_ACCUMULATOR, weight.codes.shape[0]
    if outputs % rows:
        return (
            f"{outputs} outputs, kernels that gate take a multiple of {rows}: {rows // 2} of the gate and as many of up"
        )
    return None


def _onto_config(tokens: int, weight: FloatWeight, simulate: Simulation | None) -> DecodeConfig:
    """Returns the choice for a product."""
    outputs, inputs = weight.codes.shape
    chosen = _choose("w4a16", (tokens, outputs, inputs), weight.scales.shape[0], simulate)
    assert isinstance(chosen, DecodeConfig), "few tokens have no other kernel"
    return _one_split(chosen, simulate)


def _one_split(config: DecodeConfig, simulate: Simulation | None) -> DecodeConfig:
    """Returns a configuration; simulated, of one split: the interpreter has no clusters."""
    return config if simulate is None else dataclasses.replace(config, splits=1)


def integer_matmul(
    x: Int8[Array, "tokens in"],
    token_scales: Float32[Array, "tokens"],
    token_zeros: Float32[Array, "tokens"] | None,
    weight: IntegerWeight,
    outliers: tuple[BFloat16[Array, "tokens kept"], Int[Array, "kept"]] | None = None,
    *,
    config: configs.Config | None = None,
    simulate: Simulation | None = None,
) -> BFloat16[Array, "tokens out"]:
    """Multiplies int8 activations by an int8 or int4 weight: `reference.integer_matmul` up to the last rounding.

    Args:
      x: codes of the activations; 4-bit codes (W4A4) are int8 too.
      token_scales: the step of each token's grid.
      token_zeros: the code that stands for 0, for each token; None where all are 0.
      weight: what `prepare_w8a8` or `prepare_w4a8` returned.
      outliers: features kept as numbers, whose product with the weight is added, and which they are; of int8 weights,
        a multiple of 32, those that are not wanted 0. None for none.
      config: how the work is divided; None for `configs.choose`.
      simulate: run in the interpreter on the CPU with these settings; None on an H100 or H200.

    Raises:
      ValueError: no kernel multiplies this shape.
    """
    (outputs, inputs), groups = weight.codes.shape, weight.scales.shape[0]
    kind: configs.Kind = "w4a8" if weight.codes.dtype == jnp.int4 else "w8a8"
    if outliers is not None and kind == "w4a8":
        raise ValueError(
            "outliers beside an int4 weight: kernels add them to products of int8 weights, see prepare_w8a8"
        )
    chosen = config or _choose(kind, (x.shape[0], outputs, inputs), groups, simulate)
    if isinstance(chosen, DecodeConfig):
        codes, scales, sums, zeros = weight
        if zeros is not None:
            raise ValueError(
                "an int4 weight with zeros: kernels of integers take them for int8 codes, see prepare_w8a8"
            )
        return w4a8_decode(x, token_scales, token_zeros, codes, scales, sums, config=chosen, simulate=simulate)
    if groups > 1:
        raise ValueError(f"{chosen} takes one scale for each output, given {groups} groups: prepare with one group")
    codes, scales, sums, zeros = weight.codes, weight.scales[0], weight.sums, weight.zeros
    shifts = None if zeros is None else zeros[0] * scales
    kept = None
    if outliers is not None:
        numbers, features = outliers
        columns = codes[:, features].astype(jnp.float32)
        columns = columns if zeros is None else columns - zeros.T
        kept = numbers, columns.astype(jnp.bfloat16)  # whole numbers below 256
        chosen = fitting(chosen, numbers.shape[1])
    return integer_prefill(
        x, token_scales, token_zeros, codes, scales, sums, shifts, kept, config=chosen, simulate=simulate
    )


def _choose(
    kind: configs.Kind, sizes: tuple[int, int, int], groups: int, simulate: Simulation | None
) -> configs.Config:
    """Returns the choice for sizes (tokens, out, in); simulated, without clusters: on some, the interpreter hangs."""
    chosen = configs.choose(kind, *sizes, groups)
    if simulate is not None and isinstance(chosen, PrefillConfig):
        return dataclasses.replace(chosen, cluster=1)
    return chosen
