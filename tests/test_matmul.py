"""The one multiplication: every format and dtype against `x @ dense(weight)`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant import matmul as module
from jquant.formats import (
    Layout,
    PermutedTensor,
    PreparedBinaryTensor,
    PreparedFloatTensor,
    PreparedIntegerTensor,
    PreparedSpqrTensor,
    PreparedWideTensor,
    QuantizedActivation,
    QuantizedTensor,
    UniformFormat,
    quantize_uniform,
)
from jquant.matmul import dense, matmul

RNG = np.random.default_rng(0)


def uniform(inputs: int = 48, outputs: int = 10, bits: int = 4) -> QuantizedTensor:
    codes = RNG.integers(0, 2**bits, (inputs, outputs))
    scales, zeros = RNG.uniform(0.1, 0.2, (3, outputs)), RNG.integers(0, 2**bits, (3, outputs))
    return quantize_uniform(
        jnp.asarray(codes, jnp.uint8),
        jnp.asarray(scales, jnp.float32),
        jnp.asarray(zeros, jnp.float32),
        UniformFormat(bits, inputs // 3),
    )


def permuted() -> QuantizedTensor:
    order = jnp.asarray(RNG.permutation(48), jnp.int32)[:, None]
    return PermutedTensor(inner=uniform(), order=order, shape=(48, 10))


WEIGHTS = {
    "array": jnp.asarray(RNG.standard_normal((48, 10)), jnp.float32),
    "uniform": uniform(),
    "permuted": permuted(),
    "permuted twice": PermutedTensor(inner=permuted(), order=permuted().order, shape=(48, 10)),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_product_with_the_dense_weight(name: str, dtype: str) -> None:
    weight = WEIGHTS[name]
    x = jnp.asarray(RNG.standard_normal((2, 5, 48)), dtype)
    y = jax.jit(matmul)(x, weight)
    assert (y.dtype, y.shape) == (dtype, (2, 5, 10))
    expected = np.asarray(x, np.float64) @ np.asarray(dense(weight, dtype), np.float64)
    tolerance = 1e-5 if dtype == "float32" else 2**-7 * np.abs(expected).max()  # bfloat16: the result's own rounding
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=0, atol=tolerance)


def test_sums_of_bfloat16_are_float32() -> None:
    """4096 ones and then some: a bfloat16 sum would stop at 256."""
    x, weight = jnp.ones((1, 4096), jnp.bfloat16), jnp.ones((4096, 1), jnp.bfloat16)
    assert matmul(x, weight).tolist() == [[4096.0]]


def test_float64_activations_give_float64_products() -> None:
    with jax.enable_x64(True):
        x = jnp.asarray(RNG.standard_normal((3, 48)))
        y = matmul(x, WEIGHTS["uniform"])
        np.testing.assert_allclose(y, np.asarray(x) @ np.asarray(dense(WEIGHTS["uniform"], "float64")), rtol=1e-12)
        assert y.dtype == jnp.float64


@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 4, 48), (0, 48)], ids=str)
def test_any_leading_axes(shape: tuple[int, ...]) -> None:
    for weight in WEIGHTS.values():
        assert matmul(jnp.ones(shape), weight).shape == (*shape[:-1], 10)


def test_dense_of_an_array_is_the_array_in_another_dtype() -> None:
    assert dense(jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.float32
    assert dense(WEIGHTS["uniform"], jnp.bfloat16).dtype == jnp.bfloat16


def test_a_permuted_weight_is_gathered_by_input_and_not_unpacked_twice() -> None:
    """Its rule permutes the activation; the reference rule would scatter the weight."""
    program = str(jax.make_jaxpr(matmul)(jnp.ones((1, 48)), WEIGHTS["permuted"]))
    assert "scatter" not in program
    assert "gather" in program


def test_every_pair_of_an_activation_and_a_weight_has_a_rule() -> None:
    prepared = {
        PreparedFloatTensor,
        PreparedIntegerTensor,
        PreparedWideTensor,
        PreparedBinaryTensor,
        PreparedSpqrTensor,
    }
    weights = {jax.Array, *QuantizedTensor.__subclasses__()}
    activations = {jax.Array, *QuantizedActivation.__subclasses__()}
    assert set(module._RULES) == {
        (x, weight, layout)
        for x in activations
        for weight in weights
        for layout in Layout
        if (weight in prepared) == (layout is not Layout.PORTABLE)
    }
