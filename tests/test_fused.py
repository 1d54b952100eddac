"""Products whose kernels go on with the gate, beside what XLA makes of the same; onto a stream: models/test_stream."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.formats import (
    JoinedPart,
    Layout,
    PreparedFloatTensor,
    UndividedActivation,
    UniformFormat,
    UniformTensor,
    join_weights,
    prepare_float,
    quantize_uniform,
)
from jquant.fused import gated_fault, matmul_gated
from jquant.matmul import dense
from jquant.models import Linear, Llama, LlamaConfig, decode, empty_cache, get, put, random_model, stack_layers
from jquant.models.block import run_block
from jquant.models.joined import join_shared
from jquant.numerics import Symmetry

RNG = np.random.default_rng(0)
BF16_ROUNDING = 2.0**-8
CONFIG = LlamaConfig(64, 128, 192, 2, 2, 1, 64, max_position_embeddings=64)


def weight(inputs: int, outputs: int, symmetry: Symmetry = "asymmetric") -> UniformTensor:
    codes = jnp.asarray(RNG.integers(0, 16, (inputs, outputs)), jnp.uint8)
    scales = jnp.asarray(RNG.uniform(0.01, 0.02, (inputs // 64, outputs)), jnp.bfloat16)
    zeros = (
        jnp.full_like(scales, 8)
        if symmetry == "symmetric"
        else jnp.asarray(RNG.integers(0, 16, scales.shape), jnp.bfloat16)
    )
    return quantize_uniform(codes, scales, zeros, UniformFormat(4, 64, symmetry))


def joined(inputs: int, half: int, symmetry: Symmetry = "asymmetric") -> tuple[PreparedFloatTensor, JoinedPart, Any]:
    """Return what stands for gate and up, and both as one dense weight in float64."""
    both = [weight(inputs, half, symmetry) for _ in range(2)]
    whole = join_weights([prepare_float(one, Layout.SIMULATED) for one in both])
    return whole, JoinedPart((inputs, half)), np.concatenate([np.asarray(dense(one), np.float64) for one in both], 1)


def gated(product: np.ndarray) -> np.ndarray:
    gate, up = np.split(product, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


def relative(found: jax.Array, expected: Any) -> float:
    found, expected = (np.asarray(one, np.float64) for one in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("symmetry", ["symmetric", "asymmetric"])
def test_a_gated_product_is_that_of_gate_and_up(symmetry: Symmetry) -> None:
    whole, _, both = joined(128, 192, symmetry)
    x = jnp.asarray(RNG.standard_normal((3, 1, 128)), jnp.bfloat16)
    found = matmul_gated(x, whole)
    assert (found.shape, found.dtype) == ((3, 1, 192), jnp.bfloat16)
    assert relative(found, gated(np.asarray(x, np.float64) @ both)) < BF16_ROUNDING

    squares = jnp.asarray(RNG.uniform(1, 2, (64, 8)), jnp.float32)
    undivided = UndividedActivation(x, squares, 1e-5, "bfloat16")
    expected = gated(np.asarray(undivided.dequantize(), np.float64) @ both)
    assert relative(matmul_gated(undivided, whole), expected) < BF16_ROUNDING


def test_inputs_that_are_filled_up_are_filled_with_nothing() -> None:
    whole, _, _ = joined(64, 64)
    filled = [jnp.pad(each, ((0, 1), (0, 0))) for each in (whole.scales, whole.centers)]
    wide = dataclasses.replace(
        whole, codes=jnp.pad(whole.codes, ((0, 0), (0, 64))), scales=filled[0], centers=filled[1]
    )
    x = jnp.asarray(RNG.standard_normal((2, 64)), jnp.bfloat16)
    np.testing.assert_array_equal(matmul_gated(x, wide), matmul_gated(x, whole))


def test_what_no_kernel_gates_is_told() -> None:
    (whole, part, _), (uneven, _, _) = joined(64, 64), joined(64, 128)
    x = jnp.ones((1, 64), jnp.bfloat16)
    undivided = UndividedActivation(jnp.ones((1, 32), jnp.bfloat16), jnp.ones((64, 8)), 0.0, "bfloat16")
    assert gated_fault(x, whole, part) is None
    for given, fault in (
        ((x, whole, whole), "a PreparedFloatTensor and a PreparedFloatTensor"),
        ((x, uneven, part), "192 outputs of the gate, 64 of up"),
        ((x.astype(jnp.float32), whole, part), "float32, kernels that gate give bfloat16"),
        ((undivided, whole, part), "32 undivided inputs, filled up to 64"),
        ((x[:0], whole, part), "no token"),
        ((jnp.ones((17, 64), jnp.bfloat16), whole, part), "17 tokens, kernels that gate take 16"),
    ):
        assert (gated_fault(*given) or "").startswith(fault)


def gated_model() -> tuple[Llama, Llama]:
    """Return a model in bfloat16 whose gates and ups are W4, and the same with them prepared and joined."""
    model = random_model(CONFIG, jax.random.key(0), "bfloat16")
    portable, prepared = [], []
    for block in model.layers:
        quantized, laid_out = block, block
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            kernel = weight(128, 192)
            quantized = put(quantized, name, Linear(kernel))
            laid_out = put(laid_out, name, Linear(prepare_float(kernel, Layout.SIMULATED)))
        portable.append(quantized)
        prepared.append(join_shared(laid_out))
    first, second = (dataclasses.replace(model, layers=tuple(layers)) for layers in (portable, prepared))
    return first, second


@pytest.mark.parametrize("stacked", [False, True])
def test_a_step_with_gated_products_gives_the_portable_logits(stacked: bool) -> None:
    models = [stack_layers(one) if stacked else one for one in gated_model()]
    tokens = jnp.array([3, 5], jnp.int32)

    def step(model: Llama) -> jax.Array:
        return decode(model, tokens, empty_cache(model, 2, 16))[0]

    assert [str(jax.make_jaxpr(step)(one)).count("name=w4a16_gated") for one in models] == [0, 1 if stacked else 2]
    up = put(models[1], "layers.1.mlp.up_proj.bias", jnp.ones(192, jnp.bfloat16)) if not stacked else models[1]
    assert str(jax.make_jaxpr(step)(up)).count("name=w4a16_gated") == 1  # of the layer whose linears only multiply
    expected, found = (jax.jit(step)(one) for one in models)
    assert 0 < relative(found, expected) < 2**-6  # bfloat16's rounding, elsewhere too


def test_taps_of_gated_products_are_those_of_portable_ones() -> None:
    models = gated_model()
    x = jnp.asarray(RNG.standard_normal((2, 1, 128)), jnp.bfloat16)

    def attend(queries: jax.Array, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, None]:
        return queries, None

    taps = [jax.jit(lambda block: run_block(block, x, None, attend, CONFIG)[2])(one.layers[0]) for one in models]
    np.testing.assert_array_equal(taps[0].mlp_input, taps[1].mlp_input)
    assert 0 < relative(taps[1].mlp_hidden, taps[0].mlp_hidden) < 3 * BF16_ROUNDING  # gate and up are rounded there
    kernels = [get(models[0].layers[0], f"mlp.{name}_proj").kernel for name in ("gate", "up")]
    both = np.concatenate([np.asarray(dense(one), np.float64) for one in kernels], axis=1)
    exact = gated(np.asarray(taps[1].mlp_input, np.float64) @ both)
    assert relative(taps[1].mlp_hidden, exact) < BF16_ROUNDING
