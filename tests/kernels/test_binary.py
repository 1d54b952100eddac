"""Products with binary codes, simulated on the CPU with detection of races, against their meaning in float32."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, configs, reference, shapes
from pallas_kernels.binary import binary_decode, fault_of_binary
from pallas_kernels.cases import relative_error
from pallas_kernels.decode_config import DecodeConfig
from pallas_kernels.narrow import prepare_binary, restore_binary

RNG = np.random.default_rng(0)
BF16_ROUNDING = 2.0**-8  # relative, of the output's one rounding; products are exact, sums float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "tokens", "offsets", "config"),
    [
        (4, 5, False, DecodeConfig(depth=64, stages=2)),
        (3, 2, True, DecodeConfig(depth=256, stages=1, warpgroups=2, instruction="warp", pieces="by kernel")),
    ],
    ids=["4 bits", "3 bits in two warpgroups"],
)
def test_product_is_that_of_float32(bits: int, tokens: int, offsets: bool, config: DecodeConfig) -> None:
    outputs, inputs, groups = (64, 192, 3) if bits == 4 else (64, 512, 2)
    codes = jnp.asarray(RNG.integers(0, 2**bits, (outputs, inputs)), jnp.int8)
    alphas = jnp.asarray(RNG.uniform(0.5, 1.5, (groups, bits, outputs)), jnp.float16)
    shift = jnp.asarray(RNG.standard_normal((groups, outputs)), jnp.float16) if offsets else None
    x = jnp.asarray(RNG.standard_normal((tokens, inputs)), jnp.bfloat16).at[0, :64].multiply(100).at[0, 128:].set(0)
    weight = prepare_binary(codes, alphas, shift)
    found = binary_decode(x, *weight, config=config, simulate=compat.Simulation(detect_races=True))
    dense = reference.binary_weight(codes, alphas, shift)
    expected = jnp.dot(x.astype(jnp.float32), dense.T, precision="highest")
    assert relative_error(found, expected) < BF16_ROUNDING
    assert not compat.races_found()
    restored = restore_binary(weight)
    np.testing.assert_array_equal(restored[0], codes)
    np.testing.assert_array_equal(restored[1], alphas)


def test_what_does_not_fit_is_refused() -> None:
    alphas, x = jnp.ones((4, 2, 64)), jnp.zeros((9, 512), jnp.bfloat16)
    weight = prepare_binary(jnp.zeros((64, 512), jnp.int8), alphas)
    with pytest.raises(ValueError, match="5 planes of 512 inputs"):
        prepare_binary(jnp.zeros((64, 512), jnp.int8), jnp.ones((4, 5, 64)))
    with pytest.raises(ValueError, match="9 tokens are more than 8"):
        binary_decode(x, *weight, config=DecodeConfig(depth=128))
    with pytest.raises(ValueError, match="512 inputs are no multiple of 8 ranges of 128"):
        binary_decode(x[:1], *weight, config=DecodeConfig(depth=128, warpgroups=4, splits=2))


def test_the_shapes_of_the_table_have_a_configuration() -> None:
    for linear in shapes.LUT_GEMM:
        for bits, kind in ((2, "binary2"), (3, "binary3"), (4, "binary4")):
            for tokens in (1, 8):
                config = configs.choose_narrow(kind, tokens, linear.outputs, linear.inputs, linear.inputs // 128)
                assert fault_of_binary(config, bits, linear.outputs, linear.inputs, linear.inputs // 128) is None
