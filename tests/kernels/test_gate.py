"""Products that end with a gate, in the interpreter with detection of races and compiled for CUDA, and their choice."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FloatWeight, Undivided, compat, reference
from pallas_kernels.cases import relative_error
from pallas_kernels.configs import choose_gated
from pallas_kernels.decode import w4a16_decode
from pallas_kernels.decode_config import DecodeConfig
from pallas_kernels.matmul import matmul_gated_fault, w4a16_matmul_gated
from pallas_kernels.weights import prepare_w4a16

BF16_ROUNDING = 2.0**-8
EPS = 1e-5
BY_STEP = DecodeConfig(depth=64, stages=2, rows=128, barriers="by step", instruction="warp")


class Operands:
    """Activations, a norm not yet divided and a weight, and what the gate makes of each product, in float64."""

    def __init__(self, tokens: int, inputs: int, outputs: int, group: int, *, zeros: bool) -> None:
        rng = np.random.default_rng(tokens + outputs)
        codes = jnp.asarray(rng.integers(-8, 8, (outputs, inputs)), jnp.int4)
        scales = jnp.asarray(rng.uniform(0.01, 0.02, (inputs // group, outputs)), jnp.bfloat16)
        shift = jnp.asarray(rng.integers(-8, 8, scales.shape), jnp.float32) if zeros else None
        x = jnp.asarray(rng.standard_normal((tokens, inputs)), jnp.bfloat16)
        runs = jnp.asarray(rng.uniform(1, 2, (64, compat.columns_of(tokens, integer=False))), jnp.float32)
        self.undivided, self.weight = Undivided(x, runs), prepare_w4a16(codes, scales, shift)
        self.meaning = reference.gated_matmul(x, codes, scales, shift)
        dense = np.asarray(reference.dense_weight(codes, scales, shift), np.float64).T
        roots = np.sqrt(np.asarray(runs, np.float64).sum(0)[:tokens, None] / inputs + EPS)
        product = np.asarray(x, np.float64) @ dense
        self.gated, self.divided = _gated(product), _gated(product / roots)


def _gated(product: np.ndarray) -> np.ndarray:
    gate, up = np.split(product, 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def near(found: jax.Array, expected: np.ndarray) -> bool:
    return relative_error(found, jnp.asarray(expected, jnp.float32)) < BF16_ROUNDING


@pytest.mark.parametrize(
    ("tokens", "group", "zeros", "config"),
    [
        (1, 128, False, BY_STEP),
        (5, 64, True, replace(BY_STEP, depth=128, warpgroups=2)),
        (16, 128, True, replace(BY_STEP, depth=128, stages=1, warpgroups=2)),
        (9, 32, True, DecodeConfig(depth=64, stages=2, rows=128, together=2, barriers="by step")),
    ],
    ids=["a token", "zeros, groups of 64", "groups of a copy", "by warpgroups"],
)
def test_a_gated_product_is_that_of_its_halves(tokens: int, group: int, zeros: bool, config: DecodeConfig) -> None:
    given, simulate = Operands(tokens, 256, 256, group, zeros=zeros), compat.Simulation(detect_races=True)
    (x, runs), weight = given.undivided, given.weight
    found = w4a16_decode(x, *weight, gated=True, config=config, simulate=simulate)
    assert not compat.races_found()
    assert found.shape == (tokens, 128)
    assert near(found, given.gated)
    assert near(given.meaning, given.gated)
    divided = w4a16_decode(x, *weight, squares=runs, eps=EPS, gated=True, config=config, simulate=simulate)
    assert not compat.races_found()
    assert near(divided, given.divided)


def test_far_from_0_a_gate_is_open_or_shut() -> None:
    """Numbers whose exponential is none of float32 are multiplied by 1 or by 0."""
    signs = jnp.repeat(jnp.array([1, -1], jnp.int4), 32)
    codes = jnp.concatenate([signs, jnp.ones(64, jnp.int4)])[:, None] * jnp.ones((1, 64), jnp.int4)
    x = jnp.full((1, 64), 2.0, jnp.bfloat16)
    found = w4a16_matmul_gated(x, prepare_w4a16(codes, jnp.ones((1, 128))), simulate=compat.Simulation())
    np.testing.assert_array_equal(found[0].astype(jnp.float32), np.repeat([128.0 * 128.0, 0.0], 32))


def test_the_choice_for_a_shape_is_the_same_product() -> None:
    """Simulated, a shape whose choice on a GPU is a cluster has one split."""
    assert choose_gated(3, 256, 512, 4).splits > 1
    given, simulate = Operands(3, 512, 256, 128, zeros=False), compat.Simulation()
    assert near(w4a16_matmul_gated(given.undivided.numbers, given.weight, simulate=simulate), given.gated)
    assert near(w4a16_matmul_gated(given.undivided, given.weight, eps=EPS, simulate=simulate), given.divided)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("outputs", "inputs"), [(28672, 4096), (57344, 8192), (3072, 576), (256, 64)])
def test_every_joined_weight_has_a_choice(outputs: int, inputs: int, group: int) -> None:
    groups = inputs // min(group, 64 if inputs % 128 else group)
    for tokens in (1, 8, 16):
        config = choose_gated(tokens, outputs, inputs, groups)
        assert config.rows == 128
        assert config.splits == 1 or config.cluster


def test_what_has_no_kernel_is_refused() -> None:
    given = Operands(17, 128, 128, 64, zeros=False)
    x, weight = given.undivided.numbers, given.weight
    with pytest.raises(ValueError, match="17 tokens, kernels that gate take 16"):
        w4a16_matmul_gated(x, weight)
    odd = FloatWeight(jnp.zeros((192, 128), jnp.int4), jnp.ones((1, 192), jnp.bfloat16), None)
    with pytest.raises(ValueError, match="192 outputs, kernels that gate take a multiple of 128"):
        w4a16_matmul_gated(x[:1], odd)
    assert matmul_gated_fault(16, weight) is None
    with pytest.raises(ValueError, match="no kernel ends 17 tokens' product"):
        choose_gated(17, 128, 128, 1)
    with pytest.raises(ValueError, match="blocks of 64 outputs, a gate's have 128"):
        w4a16_decode(x[:1], *weight, gated=True, config=replace(BY_STEP, rows=64))
    with pytest.raises(ValueError, match="XLA would add the 2 splits"):
        w4a16_decode(x[:1], *weight, gated=True, config=replace(BY_STEP, splits=2))


@pytest.mark.parametrize("tokens", [1, 16])
def test_a_gated_product_lowers_to_one_kernel(tokens: int) -> None:
    def shaped(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    weight = FloatWeight(jax.ShapeDtypeStruct((28672, 4096), jnp.int4), shaped(32, 28672), shaped(32, 28672))
    traced = jax.jit(w4a16_matmul_gated).trace(shaped(tokens, 4096), weight)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1
    assert f"tensor<1x{tokens}x14336xbf16>" in text
    assert f"tensor<{tokens}x28672x" not in text


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize(("outputs", "inputs", "zeros"), [(28672, 4096, False), (28672, 4096, True), (3072, 576, True)])
def test_gated_products_on_a_gpu(tokens: int, outputs: int, inputs: int, zeros: bool) -> None:
    given = Operands(tokens, inputs, outputs, 64, zeros=zeros)
    x, weight = given.undivided.numbers, given.weight
    found = w4a16_matmul_gated(x, weight)
    np.testing.assert_array_equal(found, w4a16_matmul_gated(x, weight))
    assert near(found, given.gated)
    assert near(w4a16_matmul_gated(given.undivided, weight, eps=EPS), given.divided)
