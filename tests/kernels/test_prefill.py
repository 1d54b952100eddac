"""Products of many tokens, simulated on the CPU with detection of races, against their meaning in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, reference
from pallas_kernels.matmul import integer_matmul, w4a16_matmul
from pallas_kernels.prefill import PrefillConfig
from pallas_kernels.weights import prepare_w4a8, prepare_w4a16, prepare_w8a8

RNG = np.random.default_rng(1)
BF16_ROUNDING = 2.0**-8  # relative, of the operand's and the output's roundings, which are half of it at most each


def relative(found: jax.Array, expected: jax.Array) -> float:
    return float(jnp.linalg.norm(found.astype(jnp.float32) - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize(
    ("outputs", "config"),
    [
        (256, PrefillConfig(tokens=16, stages=2, blocks=2, spill=8)),
        (64, PrefillConfig(tokens=32, stages=1, warpgroups=1, cluster=1, spill=32, splits=2)),
    ],
    ids=["clusters", "halves of the inputs"],
)
def test_w4a16_is_the_product(outputs: int, config: PrefillConfig) -> None:
    tokens, inputs, group = 28, 128, 32
    x = jnp.asarray(RNG.standard_normal((tokens, inputs)), jnp.bfloat16)
    codes = jnp.asarray(RNG.integers(-8, 8, (outputs, inputs)), jnp.int4)
    scales = jnp.asarray(RNG.uniform(0.5, 1.5, (inputs // group, outputs)), jnp.float16)
    zeros = jnp.asarray(RNG.integers(-8, 8, scales.shape), jnp.float32)
    simulation = compat.Simulation(detect_races=True)
    found = w4a16_matmul(x, prepare_w4a16(codes, scales, zeros), config=config, simulate=simulation)
    assert relative(found, reference.float_matmul(x, codes, scales, zeros)) < BF16_ROUNDING
    assert not compat.races_found()


@pytest.mark.parametrize("kind", ["w4a8", "w8a8"])
def test_integers_are_the_product_with_zeros(kind: str) -> None:
    tokens, outputs, inputs = 20, 64, 256  # two tiles of one block, its copies going on from one to the next
    x = jnp.asarray(RNG.integers(-128, 128, (tokens, inputs)), jnp.int8)
    steps = jnp.asarray(RNG.uniform(0.5, 1.5, tokens), jnp.float32)
    zeros = jnp.asarray(RNG.integers(-128, 128, tokens), jnp.float32)
    codes = jnp.asarray(RNG.integers(-8, 8, (outputs, inputs)), jnp.int8)
    scales = jnp.asarray(RNG.uniform(0.5, 1.5, (1, outputs)), jnp.float32)
    weight, of_weight, outliers = prepare_w4a8(codes, scales), None, None
    if kind == "w8a8":
        outliers = jnp.asarray(99 * RNG.standard_normal((tokens, 32)), jnp.bfloat16), jnp.arange(32)[::-1]
        of_weight = jnp.asarray(RNG.integers(-128, 128, (1, outputs)), jnp.float32)
        weight = prepare_w8a8(codes, scales, of_weight)
    config = PrefillConfig(tokens=16, depth=128, stages=2, cluster=1, warpgroups=1, blocks=1, spill=16)
    simulation = compat.Simulation(detect_races=True)
    found = integer_matmul(x, steps, zeros, weight, outliers, config=config, simulate=simulation)
    values = (x.astype(jnp.float32) - zeros[:, None]) * steps[:, None]
    if outliers is not None:
        values = values.at[:, outliers[1]].add(outliers[0].astype(jnp.float32))
    assert relative(found, reference.float_matmul(values, codes, scales, of_weight)) < BF16_ROUNDING
    assert not compat.races_found()


def test_what_does_not_fit_is_refused() -> None:
    weight = prepare_w4a16(jnp.zeros((128, 256), jnp.int4), jnp.ones((2, 128)))
    with pytest.raises(ValueError, match="128 outputs are no multiple of 256"):
        w4a16_matmul(jnp.zeros((8, 256), jnp.bfloat16), weight, config=PrefillConfig())
    grouped = prepare_w4a8(jnp.zeros((128, 256), jnp.int4), jnp.ones((2, 128)))
    with pytest.raises(ValueError, match="one group for integers"):
        integer_matmul(jnp.zeros((128, 256), jnp.int8), jnp.ones(128), None, grouped)
    with pytest.raises(ValueError, match="given 2 groups"):
        integer_matmul(jnp.zeros((8, 256), jnp.int8), jnp.ones(8), None, grouped, config=PrefillConfig(cluster=1))
