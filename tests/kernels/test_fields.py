"""The words of narrow codes: exact and reversible, and a bit where the docstring puts it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fields import (
    BLOCK,
    BLOCKS,
    THREES,
    WORDS,
    load_signs,
    load_threes,
    places_of_signs,
    store_signs,
    store_threes,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_signs_are_stored_reversibly_where_the_table_says(bits: int) -> None:
    run = BLOCK * BLOCKS[bits]
    codes = RNG.integers(0, 2**bits, (2, run)).astype(np.int8)
    stored = jax.jit(store_signs, static_argnums=1)(jnp.asarray(codes), bits)
    assert stored.dtype == jnp.int4
    np.testing.assert_array_equal(jax.jit(load_signs, static_argnums=1)(stored, bits), codes)
    assert len(set(places_of_signs(bits).values())) == bits * BLOCKS[bits] == 8 * WORDS[bits]
    nibbles = np.asarray(stored.astype(jnp.int8), np.int32)[0, : 32 * WORDS[bits]] & 15
    for (block, plane), (word, bit) in places_of_signs(bits).items():
        for thread in range(4):
            for byte in range(4):
                nibble = nibbles[32 * word + 8 * thread + 2 * byte + bit // 4]
                assert (nibble >> bit % 4) & 1 == (codes[0, BLOCK * block + 4 * thread + byte] >> plane) & 1


def test_threes_are_stored_reversibly() -> None:
    codes = RNG.integers(0, 8, (3, 2 * THREES)).astype(np.int8)
    stored = jax.jit(store_threes)(jnp.asarray(codes))
    assert stored.shape == (3, 2 * THREES * 3 // 4)
    np.testing.assert_array_equal(jax.jit(load_threes)(stored), codes)
