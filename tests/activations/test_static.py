"""Static scales: from the largest magnitude of calibration, the same for every token."""

import jax.numpy as jnp
import numpy as np
import pytest

from jquant.activations import PerToken, StaticTensor
from jquant.errors import FormatError

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((5, 32)), jnp.float32)


def test_one_token_is_the_dynamic_grid_of_its_own_maximum() -> None:
    for bits in (4, 8):
        static = StaticTensor(bits).fit(jnp.abs(X[0]))(X[:1], None)
        dynamic = PerToken(bits).fit(None)(X[:1], None)
        np.testing.assert_array_equal(static.codes, dynamic.codes)
        np.testing.assert_array_equal(static.scales, dynamic.scales)


def test_scale_is_by_hand() -> None:
    absmax = jnp.array([1.0, 12.7, 3.0])
    np.testing.assert_allclose(StaticTensor().fit(absmax).scale, 0.1, rtol=1e-6)
    np.testing.assert_allclose(StaticTensor(symmetry="symmetric_signed").fit(absmax).scale, 12.7 / 128, rtol=1e-6)
    np.testing.assert_allclose(StaticTensor(clip_ratio=0.5).fit(absmax).scale, 0.05, rtol=1e-6)


def test_what_calibration_did_not_see_is_clipped() -> None:
    quantizer = StaticTensor(8).fit(jnp.array([12.7]))
    np.testing.assert_allclose(
        quantizer(jnp.array([50.0, -50.0, 0.04]), None).dequantize(), [12.7, -12.8, 0], rtol=1e-6
    )


def test_a_dead_input_gives_zeros() -> None:
    quantizer = StaticTensor(8).fit(jnp.zeros(32))
    np.testing.assert_array_equal(quantizer(jnp.zeros((2, 32)), None).dequantize(), 0)


def test_bad_settings() -> None:
    with pytest.raises(FormatError, match="bits=16 for an activation: give 2 to 8"):
        StaticTensor(16)
    with pytest.raises(FormatError, match="clip_ratio=-1"):
        StaticTensor(clip_ratio=-1.0)
