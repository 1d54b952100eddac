"""Products of a few tokens, simulated on the CPU with detection of races, against their meaning in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, configs, reference
from pallas_kernels.cases import Case
from pallas_kernels.decode_config import DecodeConfig
from pallas_kernels.matmul import integer_matmul, w4a16_matmul
from pallas_kernels.weights import prepare_w4a8, prepare_w4a16

RNG = np.random.default_rng(0)
BF16_ROUNDING = 2.0**-8  # relative, of the output's one rounding; sums are float32


def relative(found: jax.Array, expected: jax.Array) -> float:
    return float(jnp.linalg.norm(found.astype(jnp.float32) - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize(
    ("tokens", "outputs", "group", "dtype", "config"),
    [
        (3, 64, 32, "float16", DecodeConfig(depth=64, stages=2, warpgroups=2, splits=2)),
        (9, 128, 256, "bfloat16", DecodeConfig(depth=128, stages=2, rows=128)),
        (9, 64, 128, "float16", DecodeConfig(depth=256, stages=1, instruction="warp")),
        (
            3,
            64,
            32,
            "bfloat16",
            DecodeConfig(depth=64, stages=2, splits=4, cluster=True, barriers="by step", instruction="warp"),
        ),
    ],
    ids=[
        "groups of 32, shared inputs",
        "per channel, padded tokens",
        "products of warps",
        "products of warps in clusters",
    ],
)
def test_w4a16_is_the_product(tokens: int, outputs: int, group: int, dtype: str, config: DecodeConfig) -> None:
    """Scales are those that were given, of either dtype: only the product is rounded, to bfloat16."""
    inputs = 256
    x = jnp.asarray(RNG.standard_normal((tokens, inputs)), jnp.bfloat16)
    codes = jnp.asarray(RNG.integers(-8, 8, (outputs, inputs)), jnp.int4)
    scales = jnp.asarray(RNG.uniform(0.5, 1.5, (inputs // group, outputs)), dtype)
    zeros = jnp.asarray(RNG.integers(-8, 8, scales.shape), jnp.float32)
    weight = prepare_w4a16(codes, scales, zeros)
    found = w4a16_matmul(x, weight, config=config, simulate=compat.Simulation(detect_races=True))
    expected = np.asarray(reference.float_matmul(x, codes, scales, zeros))
    apart = np.abs(np.asarray(found, np.float32) - expected)
    assert np.all(apart <= 2**-8 * np.abs(expected) + 2**-20 * np.abs(expected).max())
    assert not compat.races_found()


def test_w4a8_is_the_product_with_tokens_zeros() -> None:
    tokens, outputs, inputs, groups = 5, 64, 256, 2
    x = jnp.asarray(RNG.integers(-128, 128, (tokens, inputs)), jnp.int8)
    steps, zeros = jnp.asarray(RNG.uniform(0.5, 1.5, tokens), jnp.float32), RNG.integers(-128, 128, tokens)
    codes = jnp.asarray(RNG.integers(-8, 8, (outputs, inputs)), jnp.int4)
    scales = jnp.asarray(RNG.uniform(0.5, 1.5, (groups, outputs)), jnp.float32)
    shift = jnp.asarray(zeros, jnp.float32)
    config = DecodeConfig(depth=64, stages=2, splits=2)
    simulation = compat.Simulation(detect_races=True)
    found = integer_matmul(x, steps, shift, prepare_w4a8(codes, scales), config=config, simulate=simulation)
    dense = x.astype(jnp.float32) - shift[:, None]
    expected = reference.float_matmul(dense, codes, scales) * steps[:, None]
    assert relative(found, expected) < BF16_ROUNDING
    assert not compat.races_found()


@pytest.mark.parametrize("kind", ["w4a16", "w4a8"])
def test_products_of_warps_lower_to_cuda(kind: configs.Kind) -> None:
    case = Case(kind, 16, 64, 1024, 8 if kind == "w4a16" else 1)
    given = jax.eval_shape(lambda: case.operands(0))
    weight = jax.eval_shape(case.prepare, given)
    kernel = jax.jit(case.kernel(DecodeConfig(depth=256, stages=2, instruction="warp")))
    traced = kernel.trace(given.x, given.steps, given.shift, weight)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_what_does_not_fit_is_refused() -> None:
    weight = prepare_w4a16(jnp.zeros((64, 256), jnp.int4), jnp.ones((2, 64)))
    with pytest.raises(ValueError, match="256 inputs are no multiple of 512"):
        w4a16_matmul(jnp.zeros((1, 256), jnp.bfloat16), weight, config=DecodeConfig(depth=256, splits=2))
    with pytest.raises(ValueError, match="65 tokens are more than 64"):
        w4a16_matmul(jnp.zeros((65, 256), jnp.bfloat16), weight, config=DecodeConfig())
    with pytest.raises(ValueError, match="no w4a16 kernel multiplies 1 tokens by a weight"):
        w4a16_matmul(jnp.zeros((1, 172), jnp.bfloat16), weight._replace(codes=jnp.zeros((576, 172), jnp.int4)))
    shifted = prepare_w4a8(jnp.zeros((64, 256), jnp.int4), jnp.ones((1, 64)))._replace(zeros=jnp.ones((1, 64)))
    with pytest.raises(ValueError, match="an int4 weight with zeros"):
        integer_matmul(jnp.zeros((1, 256), jnp.int8), jnp.ones(1), None, shifted)
    narrow = prepare_w4a8(jnp.zeros((64, 256), jnp.int4), jnp.ones((8, 64)))
    with pytest.raises(ValueError, match="groups of 32 inputs"):
        integer_matmul(jnp.zeros((1, 256), jnp.int8), jnp.ones(1), None, narrow)
