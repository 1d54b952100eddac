"""Products of a few tokens with int8 weights, simulated on the CPU with detection of races, against float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, reference
from pallas_kernels.decode_config import DecodeConfig
from pallas_kernels.wide import choose_wide, prepare_w8a16, restore_w8a16, w8a16_decode

RNG = np.random.default_rng(0)
BF16_ROUNDING = 2.0**-8  # relative, of the output's one rounding; sums are float32


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "config"),
    [(3, 128, 256, DecodeConfig(64, 2, 2)), (9, 64, 512, DecodeConfig(256, 2, 1, 2))],
    ids=["two warpgroups", "padded tokens, two splits"],
)
def test_w8a16_is_the_product(tokens: int, outputs: int, inputs: int, config: DecodeConfig) -> None:
    check(tokens, outputs, inputs, config, compat.Simulation(detect_races=True))
    assert not compat.races_found()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 16, 64])
@pytest.mark.parametrize(("outputs", "inputs"), [(8192, 4096), (49152, 576)])
def test_w8a16_on_a_gpu_is_the_product(tokens: int, outputs: int, inputs: int) -> None:
    check(tokens, outputs, inputs, choose_wide(tokens, inputs), None)


def check(tokens: int, outputs: int, inputs: int, config: DecodeConfig, simulate: compat.Simulation | None) -> None:
    x = jnp.asarray(RNG.standard_normal((tokens, inputs)), jnp.bfloat16)
    codes = jnp.asarray(RNG.integers(-128, 128, (outputs, inputs)), jnp.int8)
    scales = jnp.asarray(RNG.uniform(0.5, 1.5, outputs), jnp.float32)
    weight = prepare_w8a16(codes, scales)
    np.testing.assert_array_equal(restore_w8a16(weight)[0], codes)
    found = w8a16_decode(x, weight, config=config, simulate=simulate)
    expected = reference.float_matmul(x, codes, scales[None])
    error = jnp.linalg.norm(found.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    assert float(error) < BF16_ROUNDING


def test_every_number_of_tokens_has_a_configuration_that_lowers() -> None:
    for tokens, inputs in ((1, 4096), (64, 4096), (1, 576), (64, 14336)):
        assert choose_wide(tokens, inputs).fault(128, inputs, 1) is None
    shapes = [
        jax.ShapeDtypeStruct(*of) for of in (((1, 256), jnp.bfloat16), ((64, 256), jnp.int8), ((64,), jnp.float32))
    ]
    traced = jax.jit(lambda x, *weight: w8a16_decode(x, prepare_w8a16(*weight))).trace(*shapes)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 1


def test_what_does_not_fit_is_refused() -> None:
    weight = prepare_w8a16(jnp.zeros((64, 256), jnp.int8), jnp.ones(64))
    with pytest.raises(ValueError, match="65 tokens are more than 64: multiply by XLA"):
        w8a16_decode(jnp.zeros((65, 256), jnp.bfloat16), weight)
    with pytest.raises(ValueError, match="100 outputs are no multiple of 64"):
        w8a16_decode(jnp.zeros((1, 256), jnp.bfloat16), prepare_w8a16(jnp.zeros((100, 256), jnp.int8), jnp.ones(100)))
    with pytest.raises(ValueError, match="250 inputs are no multiple of 16"):
        prepare_w8a16(jnp.zeros((64, 250), jnp.int8), jnp.ones(64))
    with pytest.raises(ValueError, match="570 inputs are no multiple of 64"):
        choose_wide(1, 570)
