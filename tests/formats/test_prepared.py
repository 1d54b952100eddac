"""Uniform tensors for kernels: back bit for bit, odd widths filled up, the product of the portable tensor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jquant.activations import PerToken
from jquant.errors import FormatError
from jquant.formats import (
    Layout,
    UniformFormat,
    UniformTensor,
    integer_fault,
    prepare_float,
    prepare_integer,
    quantize_uniform,
)
from jquant.matmul import matmul


def random_tensor(shape: tuple[int, int], format: UniformFormat, seed: int = 0) -> UniformTensor:
    rng, groups = np.random.default_rng(seed), format.groups(shape[0])
    codes, zeros = (rng.integers(0, 2**format.bits, (rows, shape[1])) for rows in (shape[0], groups))
    scales = jnp.asarray(rng.uniform(0.5, 1.5, zeros.shape), jnp.float32)
    return quantize_uniform(jnp.asarray(codes, jnp.uint8), scales, jnp.asarray(zeros, jnp.float32), format)


@settings(max_examples=4, deadline=None)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 32]),
    symmetry=st.sampled_from(["asymmetric", "symmetric"]),
    scale_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    seed=st.integers(0, 2**16),
)
def test_every_bit_comes_back(bits: int, group: int | None, symmetry: str, scale_dtype: str, seed: int) -> None:
    format = UniformFormat(bits, group, symmetry, scale_dtype)  # type: ignore[arg-type]
    tensor = random_tensor((96 if group else 100, 70), format, seed)
    prepared = []
    if bits <= 4:
        prepared.append(prepare_float(tensor, Layout.HOPPER))
    if integer_fault(format, tensor.shape) is None:
        prepared.append(prepare_integer(tensor, Layout.HOPPER))
    for one in prepared:
        back = one.restore()
        assert jax.tree.structure(back) == jax.tree.structure(tensor)
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tensor), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kernel_multiplies_as_the_portable_rule_does(dtype: str) -> None:
    """Of 100 inputs and 70 outputs, both filled up. Each factor and the product are rounded to bfloat16, by 2^-9."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 100)).astype(dtype)
    tensor = random_tensor((100, 70), UniformFormat(4, None))
    y, expected = (matmul(x, one) for one in (prepare_float(tensor, Layout.SIMULATED), tensor))
    assert (y.dtype, y.shape) == (dtype, (2, 3, 70))
    assert float(jnp.linalg.norm((y - expected).astype(jnp.float32))) < 2**-7 * float(
        jnp.linalg.norm(expected.astype(jnp.float32))
    )
    assert matmul(x[:, :0], prepare_float(tensor, Layout.HOPPER)).shape == (2, 0, 70)


def test_integers_multiply_exactly_but_for_the_last_rounding() -> None:
    x = PerToken(8, "asymmetric").fit(None)(jax.random.normal(jax.random.key(0), (2, 3, 100)), None)
    tensor = random_tensor((100, 70), UniformFormat(8, None, "asymmetric", "float32"))
    y, expected = (matmul(x, one) for one in (prepare_integer(tensor, Layout.SIMULATED), tensor))
    atol = 1e-5 * float(jnp.abs(expected).max())  # float32 sums where zeros are corrected
    np.testing.assert_allclose(y, expected, rtol=2**-8, atol=atol)
    grouped = PerToken(8, group_size=50).fit(None)(jax.random.normal(jax.random.key(0), (2, 3, 100)), None)
    y, expected = matmul(grouped, prepare_integer(tensor, Layout.HOPPER)), grouped.dequantize() @ tensor.dequantize()
    np.testing.assert_allclose(y, expected, atol=atol)


def test_what_has_no_kernel_is_refused() -> None:
    with pytest.raises(
        FormatError, match=r"no kernel multiplies a \(64, 8\) tensor of .*8 bits for float.*keep it port"
    ):
        prepare_float(random_tensor((64, 8), UniformFormat(8, 32)), Layout.HOPPER)
    with pytest.raises(FormatError, match="2 groups of inputs, kernels of integers take one scale for each output"):
        prepare_integer(random_tensor((64, 8), UniformFormat(4, 32, "symmetric")), Layout.HOPPER)
