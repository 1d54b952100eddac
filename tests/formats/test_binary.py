"""Binary codes: their bits, the image of uniform tensors, and products by table against the dense product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.errors import FormatError
from jquant.formats import BinaryFormat, BinaryTensor, UniformFormat, binary_from_uniform, quantize_binary
from jquant.formats.uniform import quantize_uniform
from jquant.matmul import LOOKUP_ROWS, dense, lookup_matmul, matmul
from jquant.numerics import Symmetry
from jquant.quantizers import Rtn
from tests.oracles import closed_form


def random_binary(inputs: int, outputs: int, format: BinaryFormat, *, offset: bool = False) -> BinaryTensor:
    rng = np.random.default_rng(inputs + format.bits)
    alphas = rng.uniform(0.1, 1.0, (format.bits, format.groups(inputs), outputs))
    codes = jnp.asarray(rng.integers(0, 2**format.bits, (inputs, outputs)), jnp.uint8)
    offsets = jnp.asarray(rng.standard_normal(alphas.shape[1:]), jnp.float32) if offset else None
    return quantize_binary(codes, jnp.asarray(alphas, jnp.float32), offsets, format)


def test_golden_image_of_a_uniform_row() -> None:
    """spec_weights.md section 7: s = .14226571, z = 7, q = 15, 9, 0, 10."""
    one = jnp.ones((1, 1))
    codes = jnp.array([[15], [9], [0], [10]], jnp.uint8)
    tensor = quantize_uniform(codes, 0.14226571 * one, 7 * one, UniformFormat(4, None, scale_dtype="float32"))
    image = binary_from_uniform(tensor)
    np.testing.assert_allclose(image.alphas.ravel(), [0.07113285, 0.14226571, 0.28453141, 0.56906282], rtol=1e-7)
    np.testing.assert_allclose(image.offsets, [[0.07113278]], rtol=2e-6)
    assert image.signs.ravel().tolist() == [0b0011, 0b1001, 0b0001, 0b1011]  # bit j of plane k: b_k of input j
    np.testing.assert_allclose(image.dequantize(), tensor.dequantize(), atol=1.2e-7)


@pytest.mark.parametrize(
    ("bits", "group", "symmetry"), [(2, None, "symmetric"), (3, 15, "asymmetric"), (8, 45, "asymmetric")]
)
def test_image_of_narrow_scales_is_exact(bits: int, group: int | None, symmetry: Symmetry) -> None:
    weight = 1e-4 * jax.random.normal(jax.random.key(bits), (45, 7))  # scales among float16's subnormal numbers
    tensor, _ = jax.jit(Rtn(UniformFormat(bits, group, symmetry)))(weight, None, jax.random.key(0))
    image = jax.jit(binary_from_uniform)(tensor)
    assert image.shape == tensor.shape
    assert image.format == BinaryFormat(bits, group, "float32")
    same = jax.jit(lambda one, other: (one.dequantize() == other.dequantize()).all())(image, tensor)
    assert same


def test_image_may_be_kept_in_fewer_bits() -> None:
    tensor, _ = jax.jit(Rtn(UniformFormat(4, 16)))(
        jax.random.normal(jax.random.key(0), (64, 8)), None, jax.random.key(0)
    )
    image = binary_from_uniform(tensor, "float16")
    assert image.bits_per_weight() == 4 + (4 + 1) * 16 / 16
    np.testing.assert_allclose(image.dequantize(), tensor.dequantize(), atol=2e-3)


def test_constructor_refuses_alphas_of_another_shape() -> None:
    codes, format = jnp.zeros((32, 2), jnp.uint8), BinaryFormat(3, 16)
    with pytest.raises(FormatError, match=r"alphas of \(3, 1, 2\) for codes \(32, 2\): give \(3, 2, 2\) and \(2, 2\)"):
        quantize_binary(codes, jnp.ones((3, 1, 2)), None, format)
    with pytest.raises(FormatError, match="group_size 24 does not divide 32 inputs"):
        quantize_binary(codes, jnp.ones((3, 1, 2)), None, BinaryFormat(3, 24))


def test_golden_product() -> None:
    """spec_weights.md section 7: K = 32, M = 2, two signs, alphas, biases and activations by formula."""
    inputs, outputs, planes = np.arange(32)[:, None, None], np.arange(2)[:, None], np.arange(2)
    positive = (inputs * (3 + 2 * outputs) + 5 * planes) % 7 < 3  # [in, out, bits]
    codes = jnp.asarray((positive << planes).sum(axis=-1), jnp.uint8)
    alphas = jnp.array([[[0.5, 0.4]], [[0.25, 0.1]]])
    tensor = quantize_binary(codes, alphas, jnp.array([[0.05, -0.02]]), BinaryFormat(2, None, "float32"))
    words = np.asarray(tensor.signs.transpose(0, 2, 1)).copy().view("<u4")[..., 0]  # [bits, out]
    assert words.tolist() == [[0x952A54A9, 0x993264C9], [0xA952A54A, 0x4C993264]]
    x = jnp.asarray(np.sin(0.3 * np.arange(32) + 0.1), jnp.float32)
    for product in (lookup_matmul, matmul):
        np.testing.assert_allclose(product(x, tensor), [-0.4734404, -0.69484742], atol=1e-6)


def test_golden_matrix_product() -> None:
    """Keys of the bytes and products for the greedy start and one round at two signs."""
    keys = np.array([[203, 81], [105, 29], [36, 109], [182, 160]], np.uint8)  # [out, bits]
    alphas = np.array([[0.658187, 0.356826], [0.672223, 0.280396], [0.394288, 0.308246], [0.613419, 0.221530]])
    codes = (keys[:, None, :] >> np.arange(8)[:, None] & 1) @ np.array([1, 2])  # [out, in]
    tensor = quantize_binary(
        jnp.asarray(codes.T, jnp.uint8),
        jnp.asarray(alphas.T[:, None, :], jnp.float32),
        None,
        BinaryFormat(2, None, "float32"),
    )
    np.testing.assert_array_equal(tensor.signs[:, 0].T, keys)
    y = lookup_matmul(jnp.asarray(closed_form.inputs()[0], jnp.float32), tensor)
    np.testing.assert_allclose(y, [1.68049, -3.132414, -0.875037, 0.557656], atol=5e-6)


@pytest.mark.parametrize(
    ("inputs", "group", "rows", "offset"),
    [
        (96, 32, 1, True),
        (64, None, LOOKUP_ROWS, False),
        (64, None, LOOKUP_ROWS + 1, True),  # the dense rule
        (36, 12, 1, False),  # too: a byte has two alphas
    ],
)
def test_products_are_those_with_the_dense_weight(inputs: int, group: int | None, rows: int, *, offset: bool) -> None:
    tensor = random_binary(inputs, 10, BinaryFormat(3, group), offset=offset)
    x = jnp.asarray(np.random.default_rng(rows).standard_normal((1, rows, inputs)), jnp.float32)
    expected = np.asarray(x, np.float64) @ np.asarray(tensor.dequantize(), np.float64)
    np.testing.assert_allclose(jax.jit(matmul)(x, tensor), expected, atol=2e-5)


def test_eager_products_are_those_with_the_dense_weight() -> None:
    tensor, x = random_binary(32, 4, BinaryFormat(2, 16)), jnp.ones((1, 32))
    np.testing.assert_allclose(matmul(x, tensor), x @ tensor.dequantize(), atol=2e-5)


def test_lookup_is_exact_in_float64() -> None:
    tensor = random_binary(128, 12, BinaryFormat(4, 64), offset=True)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 128)))
        y = lookup_matmul(x, tensor)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, np.asarray(x) @ np.asarray(dense(tensor, jnp.float64)), atol=1e-12)


def test_products_of_stacked_weights_and_of_bfloat16() -> None:
    tensor = random_binary(64, 6, BinaryFormat(2, 32))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[..., ::-1]]), tensor)
    x = jax.random.normal(jax.random.key(0), (2, 1, 64), jnp.bfloat16)
    y = jax.jit(jax.vmap(matmul))(x, stacked)
    assert (y.dtype, y.shape) == (jnp.bfloat16, (2, 1, 6))
    expected = np.asarray(x, np.float64) @ np.asarray(tensor.dequantize(), np.float64)
    np.testing.assert_allclose(y[0].astype(jnp.float32), expected[0], rtol=2**-8)
    np.testing.assert_allclose(y[1].astype(jnp.float32), expected[1][:, ::-1], rtol=2**-8)


def test_lookup_refuses_groups_that_a_byte_does_not_divide() -> None:
    with pytest.raises(FormatError, match="groups of 12 inputs: table lookup needs multiples of 8; use matmul"):
        lookup_matmul(jnp.ones((1, 36)), random_binary(36, 4, BinaryFormat(3, 12)))
