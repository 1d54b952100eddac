"""Preparing a weight is exact and reversible, and its sums are those of the weight."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import reference
from pallas_kernels.weights import (
    prepare_w4a8,
    prepare_w4a16,
    prepare_w8a8,
    restore_integer,
    restore_w4a16,
)


@settings(max_examples=4, deadline=None)
@given(groups=st.sampled_from([1, 3]), dtype=st.sampled_from(["float16", "bfloat16"]), seed=st.integers(0, 2**16))
def test_preparing_is_reversible(groups: int, dtype: str, seed: int) -> None:
    rng, outputs = np.random.default_rng(seed), 64
    codes = rng.integers(-8, 8, (outputs, 32 * groups)).astype(np.int8)
    scales = jnp.asarray(rng.uniform(0.5, 1.5, (groups, outputs)), dtype)
    zeros = rng.integers(-8, 8, (groups, outputs)).astype(np.float32)
    found, found_scales, found_zeros = restore_w4a16(prepare_w4a16(jnp.asarray(codes), scales, jnp.asarray(zeros)))
    np.testing.assert_array_equal(found.astype(jnp.int8), codes)
    assert found_scales.dtype == scales.dtype
    np.testing.assert_array_equal(found_scales, scales)
    np.testing.assert_array_equal(found_zeros, zeros)
    for weight in (prepare_w4a8(jnp.asarray(codes), scales), prepare_w8a8(jnp.asarray(codes), scales[:1])):
        found, found_scales = restore_integer(weight)
        np.testing.assert_array_equal(found.astype(jnp.int8), codes)
        np.testing.assert_array_equal(found_scales, scales.astype(jnp.float32)[: len(found_scales)])
        dense = reference.dense_weight(jnp.asarray(codes), found_scales)
        np.testing.assert_allclose(weight.sums, dense.sum(1), rtol=0, atol=1e-5 * float(jnp.abs(dense).sum(1).max()))


def test_inputs_that_fill_no_run_are_refused() -> None:
    with pytest.raises(ValueError, match="172 inputs in 1 groups"):
        prepare_w4a16(jnp.zeros((64, 172), jnp.int4), jnp.ones((1, 64)))
