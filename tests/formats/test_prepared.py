"""Uniform tensors for kernels: back bit for bit, odd widths filled up, the product of the portable tensor."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jquant.activations import OutlierSplit, PerToken
from jquant.errors import FormatError
from jquant.formats import (
    BinaryFormat,
    Layout,
    OnlineRotation,
    SpqrFormat,
    UniformFormat,
    UniformTensor,
    float_fault,
    integer_fault,
    most_outliers,
    online_rotation,
    prepare_float,
    prepare_integer,
    prepare_online,
    prepare_outliers,
    prepare_signs,
    quantize_uniform,
)
from jquant.matmul import matmul
from tests.contracts import test_formats as formats


def portable(x: Any, tensor: Any) -> np.ndarray:
    """Return the product by the portable rule on a CPU: a GPU's int8 products are XLA's choice, once a wrong one."""
    return np.asarray(jax.jit(matmul)(*jax.device_put((x, tensor), jax.devices("cpu")[0])), np.float32)


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
    ways = [] if float_fault(format, tensor.shape) else [prepare_float]
    ways += [] if integer_fault(format, tensor.shape) else [prepare_integer]
    for prepare in ways:
        back = jax.jit(lambda one, prepare=prepare: prepare(one, Layout.HOPPER).restore())(tensor)
        assert jax.tree.structure(back) == jax.tree.structure(tensor)
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tensor), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kernel_multiplies_as_the_portable_rule_does(dtype: str) -> None:
    """Of 100 inputs and 70 outputs, both filled up. Each factor and the product are rounded to bfloat16, by 2^-9."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 100)).astype(dtype)
    tensor = random_tensor((100, 70), UniformFormat(4, None))
    prepare = jax.jit(prepare_float, static_argnums=1)
    y, expected = (jax.jit(matmul)(x, one) for one in (prepare(tensor, Layout.SIMULATED), tensor))
    assert (y.dtype, y.shape) == (dtype, (2, 3, 70))
    assert float(jnp.linalg.norm((y - expected).astype(jnp.float32))) < 2**-7 * float(
        jnp.linalg.norm(expected.astype(jnp.float32))
    )
    assert matmul(x[:, :0], prepare(tensor, Layout.SIMULATED)).shape == (2, 0, 70)


def test_integers_multiply_exactly_but_for_the_last_rounding() -> None:
    numbers = jax.random.normal(jax.random.key(0), (2, 3, 100))
    x = jax.jit(PerToken(8, "asymmetric").fit(None))(numbers, None)
    tensor = random_tensor((100, 70), UniformFormat(8, None, "asymmetric", "float32"))
    prepared = jax.jit(prepare_integer, static_argnums=1)(tensor, Layout.SIMULATED)
    y, expected = matmul(x, prepared), jax.jit(matmul)(x, tensor)
    atol = 1e-5 * float(jnp.abs(expected).max())  # float32 sums where zeros are corrected
    np.testing.assert_allclose(y, expected, rtol=2**-8, atol=atol)
    grouped = jax.eval_shape(PerToken(8, group_size=50).fit(None), numbers, None)
    assert "dot_general" in str(jax.make_jaxpr(matmul)(grouped, prepared))  # XLA's, of the numbers that both stand for


BOTH = pytest.mark.parametrize("layout", [Layout.SIMULATED, pytest.param(Layout.HOPPER, marks=pytest.mark.gpu)])


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("kind", ["signs", "spqr"])
def test_few_tokens_go_through_the_kernel_of_a_narrow_format_and_more_through_xla(kind: str, layout: Layout) -> None:
    """Activations and the product are rounded to bfloat16, by 2^-9 each; nothing is where XLA multiplies."""
    tensor: Any
    if kind == "signs":
        tensor = formats.binary(192, BinaryFormat(3, 64))[0]  # two groups in a run of words
        prepared: Any = prepare_signs(tensor, layout)
    else:
        tensor = formats.sixteen(48, SpqrFormat())[0]
        prepared = prepare_outliers(tensor, layout, most_outliers(tensor))
    for tokens, least, most in ((2, 2**-12, 2**-7), (9, 0, 2**-7)):
        x = jax.random.normal(jax.random.key(0), (tokens, tensor.shape[0]))
        y, expected = np.asarray(jax.jit(matmul)(x, prepared)), portable(x, tensor)
        assert least <= np.linalg.norm(y - expected) / np.linalg.norm(expected) < most


@BOTH
@pytest.mark.parametrize("symmetry", ["symmetric", "asymmetric"])
def test_a_rotation_and_its_grid_are_one_kernel(symmetry: Any, layout: Layout) -> None:
    """One code in ten is a neighbour at most: what is between the kernel's products is rounded to bfloat16."""
    x = jax.random.normal(jax.random.key(0), (3, 192)).astype(jnp.bfloat16)
    rotation, method = online_rotation(192), PerToken(8, symmetry, clip_ratio=0.9)
    found = prepare_online(rotation, layout).quantize(x, 8, 0.9, symmetry)
    expected = method.fit(None)(rotation(x.astype(jnp.float32)), None)
    assert jax.tree.structure(found) == jax.tree.structure(dataclasses.replace(expected, dtype="bfloat16"))
    zeros = jnp.zeros(()) if found.zeros is None else found.zeros - expected.zeros
    off = jnp.abs(found.codes.astype(jnp.int32) - expected.codes.astype(jnp.int32) - zeros.astype(jnp.int32))
    assert (int(off.max()), float((off > 0).mean()) < 0.1) == (1, True)
    np.testing.assert_allclose(found.scales, expected.scales, rtol=2**-8)
    blocks = OnlineRotation(size=64, order=16, stride=1)
    with pytest.raises(
        FormatError, match="no kernel rotates by hadamard 16, 4 blocks: a rotation in 4 blocks, kernels"
    ):
        prepare_online(blocks, Layout.HOPPER)


@BOTH
def test_features_with_outliers_are_added_in_the_kernel_or_apart_where_they_are_many(layout: Layout) -> None:
    tensor = random_tensor((100, 70), UniformFormat(8, None))
    prepared = jax.jit(prepare_integer, static_argnums=1)(tensor, layout)
    for features in (3, 40):
        numbers = jax.random.normal(jax.random.key(0), (2, 100)).at[:, :features].multiply(20.0)
        x = jax.jit(OutlierSplit().fit(None))(numbers, None)
        y, expected = np.asarray(jax.jit(matmul)(x, prepared)), portable(x, tensor)
        assert np.linalg.norm(y - expected) / np.linalg.norm(expected) < 2**-7


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_the_gpu_multiplies_as_the_portable_rules_do(tokens: int) -> None:
    numbers = jax.random.normal(jax.random.key(0), (tokens, 300)).astype(jnp.bfloat16)
    integers = jax.jit(PerToken(8, "asymmetric").fit(None))(numbers, None)
    cases = (
        (prepare_float, numbers, UniformFormat(4, None)),
        (prepare_integer, integers, UniformFormat(4, None, "symmetric")),
        (prepare_integer, integers, UniformFormat(8, None)),
    )
    for prepare, x, format in cases:
        tensor = random_tensor((300, 200), format)
        prepared = jax.jit(prepare, static_argnums=1)(tensor, Layout.HOPPER)
        y, expected = np.asarray(jax.jit(matmul)(x, prepared), np.float32), portable(x, tensor)
        assert np.linalg.norm(y - expected) < 2**-7 * np.linalg.norm(expected), format


def test_what_has_no_kernel_is_refused() -> None:
    with pytest.raises(
        FormatError, match=r"no kernel multiplies a \(64, 8\) tensor of .*8 bits for float.*keep it port"
    ):
        prepare_float(random_tensor((64, 8), UniformFormat(8, 32)), Layout.HOPPER)
    with pytest.raises(FormatError, match="2 groups of inputs, kernels of integers take one scale for each output"):
        prepare_integer(random_tensor((64, 8), UniformFormat(4, 32, "symmetric")), Layout.HOPPER)
