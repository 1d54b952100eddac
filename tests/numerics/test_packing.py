"""Bit streams: golden words of the GPTQ format, equality with a bit-by-bit oracle, and every round trip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jquant.errors import FormatError
from jquant.numerics import pack, packed_length, unpack
from tests.oracles import packing as oracle

PROPERTY = settings(max_examples=16, deadline=None, derandomize=True)
pack_jit = jax.jit(pack, static_argnums=1)  # one compilation for each shape, not one for each operation
unpack_jit = jax.jit(unpack, static_argnums=(1, 2))


def random_codes(seed: int, shape: tuple[int, ...], bits: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint8)


def words(packed: jax.Array) -> list[int]:
    """Read a packed column as little-endian 32-bit words."""
    return np.asarray(packed)[:, 0].copy().view("<u4").tolist()


def test_four_bit_golden_word() -> None:
    codes = jnp.array([15, 9, 0, 10, 6, 1, 15, 9])[:, None]
    assert words(pack(codes, 4)) == [0x9F16A09F]


def test_three_bit_golden_words() -> None:
    codes = (jnp.arange(32) % 8)[:, None]
    assert words(pack(codes, 3)) == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]


@PROPERTY
@given(bits=st.integers(1, 8), count=st.integers(0, 37), seed=st.integers(0, 9))
def test_equals_oracle_and_comes_back(bits: int, count: int, seed: int) -> None:
    codes = random_codes(seed, (count, 2), bits)
    packed = pack_jit(jnp.asarray(codes), bits)
    np.testing.assert_array_equal(packed, oracle.pack(codes, bits))
    assert packed.shape == (packed_length(count, bits), 2)
    np.testing.assert_array_equal(unpack_jit(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_batch_axes_and_jit(bits: int) -> None:
    codes = jnp.asarray(random_codes(bits, (2, 3, 11, 5), bits))
    packed = pack_jit(codes, bits)
    np.testing.assert_array_equal(packed[1, 2], oracle.pack(np.asarray(codes[1, 2]), bits))
    np.testing.assert_array_equal(packed, jax.vmap(lambda one: pack(one, bits))(codes))
    np.testing.assert_array_equal(unpack_jit(packed, bits, 11), codes)


@pytest.mark.parametrize("bits", range(1, 8))
def test_too_large_code_wraps_and_spares_its_neighbours(bits: int) -> None:
    codes = jnp.zeros((9, 1), dtype=jnp.int32).at[4, 0].set(2**bits + 1)
    assert unpack_jit(pack_jit(codes, bits), bits, 9)[:, 0].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("bits", [0, 9])
def test_refuses_bits(bits: int) -> None:
    with pytest.raises(FormatError, match="1 to 8 bits"):
        pack(jnp.zeros((4, 1), dtype=jnp.uint8), bits)


def test_refuses_another_count() -> None:
    with pytest.raises(FormatError, match="4 bytes given for 9 codes of 4 bits, which take 5"):
        unpack(jnp.zeros((4, 1), dtype=jnp.uint8), 4, 9)
