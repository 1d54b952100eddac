"""The orders of stored codes: permutations, exact and reversible, and where the docstring puts each code."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.order import RUN, Order, stored_bf16, stored_int8

ORDERS = {"bf16": stored_bf16, "int8": stored_int8}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 5), runs=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_storing_is_reversible(order: Order, rows: int, runs: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-8, 8, (rows, RUN * runs)).astype(np.int8)
    stored = order.apply(jnp.asarray(codes))
    np.testing.assert_array_equal(order.invert(stored), codes)
    np.testing.assert_array_equal(order.apply(order.invert(jnp.asarray(codes))), codes)


def test_codes_lie_where_the_docstring_says() -> None:
    codes = np.arange(2 * RUN, dtype=np.int8)[None]
    bf16, int8 = np.empty_like(codes), np.empty_like(codes)
    for start in (0, RUN):
        for t in range(4):
            for i in range(4):
                for e in range(2):
                    bf16[0, start + 8 * t + 4 * e + i] = codes[0, start + 8 * i + 2 * t + e]
            for b in range(4):
                for i in range(2):
                    int8[0, start + 8 * t + 2 * b + i] = codes[0, start + 16 * i + 4 * t + b]
    np.testing.assert_array_equal(stored_bf16.apply(jnp.asarray(codes)), bf16)
    np.testing.assert_array_equal(stored_int8.apply(jnp.asarray(codes)), int8)


def test_int4_arrays_keep_their_dtype() -> None:
    codes = jnp.arange(-8, 8, dtype=jnp.int8).astype(jnp.int4)
    stored = stored_bf16.apply(jnp.concatenate([codes, codes])[None])
    assert stored.dtype == jnp.int4
    np.testing.assert_array_equal(stored_bf16.invert(stored)[0, :16].astype(jnp.int8), np.arange(-8, 8))
