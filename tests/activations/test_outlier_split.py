"""LLM.int8(): golden numbers, bitsandbytes' tensors, the oracle, and the batch dependence that the method has."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.activations import OutlierSplit, PerToken
from jquant.errors import FormatError
from jquant.formats import SplitActivation, UniformFormat, UniformTensor, quantize_uniform
from jquant.matmul import matmul
from jquant.quantizers.rtn import round_to_nearest
from tests.oracles import activations as oracle

FORMAT = UniformFormat(8, None, "symmetric", "float32")
RNG = np.random.default_rng(0)
X = RNG.standard_normal((6, 48)).astype(np.float32)
X[1, 7], X[4, 30], X[2, 7] = 9.0, -6.0, 0.5

run = jax.jit(lambda quantizer, x, valid: quantizer(x, valid))
multiply = jax.jit(matmul)
pack = jax.jit(lambda weight: round_to_nearest(weight, FORMAT, "none"))


def split(x: np.ndarray, threshold: float = 6.0, valid: list[bool] | None = None) -> SplitActivation:
    mask = None if valid is None else jnp.asarray(valid)
    return run(OutlierSplit(threshold).fit(None), jnp.asarray(x, jnp.float32), mask)


def packed(weight: np.ndarray) -> UniformTensor:
    """Return int8 per output of a weight [out, in]."""
    return pack(jnp.asarray(weight.T, jnp.float32))


def test_golden_example() -> None:
    x = np.array([[1, -2, 7, 0.5], [0.5, 1, -0.25, 3]])
    codes = np.array([[32, -64, 16, 127], [127, 13, -38, 25]])  # of W, whose -1 / 2 lies on a tie
    maxima = jnp.array([[2.0, 1.0]])
    weight = quantize_uniform(jnp.asarray(codes.T + 128, jnp.uint8), maxima / 127, 0 * maxima, FORMAT)
    found = split(x)
    np.testing.assert_array_equal(found.inner.codes, [[64, -127, 0, 32], [21, 42, 0, 127]])
    np.testing.assert_allclose(127 * found.inner.scales, [[2], [3]], rtol=1e-6)
    np.testing.assert_array_equal(found.outliers, [[0, 0, 7, 0], [0, 0, -0.25, 0]])
    expected = [[5.295307, -1.192138], [5.187055, 1.262974]]  # six decimals are given, of float32 sums
    np.testing.assert_allclose(multiply(found, weight), expected, rtol=0, atol=2e-6)


def test_bitsandbytes_tensors(shared: Path) -> None:
    """It rounds x and W to float16 before anything else."""
    golden = np.load(shared / "golden" / "llmint8.npz")
    x, weight = (golden[name].astype(np.float16).astype(np.float32) for name in ("x", "W"))
    found = split(x)
    np.testing.assert_array_equal(found.inner.codes, golden["CA"])
    np.testing.assert_allclose(127 * found.inner.scales[:, 0], golden["SCA"], rtol=1e-6)
    np.testing.assert_array_equal(np.flatnonzero(np.any(found.outliers != 0, axis=0)), golden["outlier_cols"])
    np.testing.assert_allclose(multiply(found, packed(weight)), golden["y"], rtol=0, atol=2e-5)


def test_equals_the_oracle() -> None:
    weight = RNG.standard_normal((10, 48)).astype(np.float32)
    codes, maxima, columns, product = oracle.llm_int8(X, weight)
    found = split(X)
    assert columns.tolist() == [7, 30]
    np.testing.assert_array_equal(found.inner.codes, codes)
    np.testing.assert_allclose(127 * found.inner.scales[:, 0], maxima, rtol=1e-6)
    np.testing.assert_allclose(multiply(found, packed(weight)), product, rtol=0, atol=1e-5 * np.abs(product).max())


def test_threshold_is_inclusive_and_small_values_of_outlier_features_count_in_the_scale() -> None:
    x = np.full((2, 3), 0.5)
    x[0, 1], x[1, 1] = 6.0, 5.0
    found = split(x)
    np.testing.assert_array_equal(found.outliers[:, 1], [6, 5])
    np.testing.assert_allclose(127 * found.inner.scales[:, 0], [0.5, 5.0], rtol=1e-6)
    assert not split(np.nextafter(np.float32(6), np.float32(0)) * np.ones((1, 2))).outliers.any()


def test_a_high_threshold_is_plain_int8_and_a_low_one_keeps_numbers() -> None:
    plain = PerToken(8).fit(None)(jnp.asarray(X), None)
    np.testing.assert_array_equal(split(X, 1e9).inner.codes, plain.codes)
    np.testing.assert_array_equal(split(X, 1e-9).dequantize(), X)


def test_masks_equal_gathers() -> None:
    """The published code gathers the features with outliers; a masked product over all of them is the same."""
    weight = packed(RNG.standard_normal((10, 48)))
    found, columns = split(X), [7, 30]
    others = [i for i in range(48) if i not in columns]
    dense = np.asarray(weight.dequantize(), np.float64)
    inner = np.asarray(found.inner.dequantize(), np.float64)
    expected = inner[:, others] @ dense[others] + X[:, columns] @ dense[columns]
    np.testing.assert_allclose(multiply(found, weight), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_token_depends_on_its_neighbours() -> None:
    """The method's own: the same token rounds otherwise beside a token with an outlier, and alone."""
    alone, beside = split(X[2:3]), split(X)
    assert alone.inner.codes[0, 7] != 0
    assert beside.inner.codes[2, 7] == 0
    np.testing.assert_array_equal(alone.inner.scales[0], beside.inner.scales[2])
    weight = packed(RNG.standard_normal((10, 48)))
    assert np.abs(multiply(alone, weight)[0] - multiply(beside, weight)[2]).max() > 1e-4


def test_padding_makes_no_outlier_features() -> None:
    padded = split(X, valid=[True, False, True, True, True, True])
    assert not padded.outliers[:, 7].any()
    assert padded.inner.codes[2, 7] == split(X[2:3]).inner.codes[0, 7]


def test_zero_tokens_and_tokens_of_outliers_alone() -> None:
    x = np.zeros((2, 4))
    x[1] = 50.0
    found = split(x)
    np.testing.assert_array_equal(found.dequantize(), x)
    assert np.isfinite(found.inner.scales).all()


def test_bad_settings() -> None:
    with pytest.raises(FormatError, match=r"threshold=0\.0: give a positive magnitude; per_token has no outliers"):
        OutlierSplit(0.0)
    with pytest.raises(FormatError, match="bits=12"):
        OutlierSplit(bits=12)
