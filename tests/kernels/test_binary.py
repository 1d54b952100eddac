"""Products with binary codes, simulated on the CPU with detection of races, against their meaning in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, configs, reference, shapes
from pallas_kernels.binary import binary_decode, fault_of_binary
from pallas_kernels.cases import relative_error
from pallas_kernels.decode import DecodeConfig
from pallas_kernels.narrow import prepare_binary, restore_binary
from pallas_kernels.narrow_case import BITS, KINDS, NarrowCase

RNG = np.random.default_rng(0)
BF16_ROUNDING = 2.0**-8  # relative, of the output's one rounding; products are exact, sums float32


@pytest.mark.parametrize(
    ("bits", "tokens", "offsets", "config"),
    [
        (4, 5, False, DecodeConfig(depth=64, stages=2)),
        (3, 2, True, DecodeConfig(depth=256, stages=1, warpgroups=2)),
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


@pytest.mark.parametrize("bits", [2, 3])
def test_configurations_lower_to_cuda(bits: int) -> None:
    struct = jax.ShapeDtypeStruct
    config = DecodeConfig(depth=256, stages=2, warpgroups=4, splits=2, cluster=True)
    kernel = functools.partial(binary_decode, config=config)
    given = struct((1, 4096), jnp.bfloat16), struct((64, 1024 * bits), jnp.int4), struct((32, bits, 64), jnp.float16)
    text = jax.jit(kernel).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_the_shapes_of_the_table_have_a_configuration() -> None:
    for linear in shapes.LUT_GEMM:
        for kind in KINDS:
            case = NarrowCase(kind, 1, linear.outputs, linear.inputs, linear.inputs // 128)
            bits = BITS[kind]
            assert fault_of_binary(case.config(), bits, linear.outputs, linear.inputs, case.groups) is None


def test_the_formulation_of_xla_means_the_product() -> None:
    case = NarrowCase("binary3", 2, 64, 256, 2)
    given = case.operands(0)
    function, arguments = case.xla()["bfloat16"]
    assert relative_error(function(*arguments(given)), case.meaning(given)) < 2 * BF16_ROUNDING
    shapes_ = jax.eval_shape(case.prepare, given)
    assert shapes_.signs.shape == (64, 192)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_is_the_product_with_the_same_bits_twice(kind: configs.NarrowKind, tokens: int) -> None:
    case = NarrowCase(kind, tokens, 1024, 4096, 32)
    kernel = jax.jit(case.kernel(case.config()))
    given = case.operands(tokens)
    arguments = given.x, given.steps, given.shift, case.prepare(given)
    found = kernel(*arguments)
    assert relative_error(found, case.meaning(given)) < BF16_ROUNDING
    assert bool(jnp.all(found == kernel(*arguments)))
