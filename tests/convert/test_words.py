"""Words of 32 bits: equality with an oracle of whole numbers, golden words of each format, every round trip."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import words
from jquant.numerics import pack
from tests.oracles import words as oracle

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


def random_codes(seed: int, shape: tuple[int, ...], bits: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint8)


@PROPERTY
@given(bits=st.integers(1, 8), rows=st.integers(0, 3), count=st.integers(1, 71), seed=st.integers(0, 9))
def test_dense_words_equal_the_oracle_and_come_back(bits: int, rows: int, count: int, seed: int) -> None:
    codes = random_codes(seed, (rows, count), bits)
    packed = words.pack_words(codes, bits)
    np.testing.assert_array_equal(packed, oracle.pack(codes, bits))
    assert packed.shape == (rows, words.word_count(count, bits))
    np.testing.assert_array_equal(words.unpack_words(packed, bits, count), codes)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_bytes_of_our_stream_are_the_words_of_the_files(bits: int) -> None:
    codes = random_codes(bits, (37, 3), bits)  # 37 codes: no width fills its last word
    stream = np.asarray(pack(jnp.asarray(codes), bits))
    regrouped = words.words_of_bytes(stream)
    np.testing.assert_array_equal(regrouped.T, words.pack_words(np.ascontiguousarray(codes.T), bits))
    np.testing.assert_array_equal(words.bytes_of_words(regrouped, len(stream)), stream)


@PROPERTY
@given(groups=st.integers(1, 3), seed=st.integers(0, 9))
def test_interleaved_words_equal_the_oracle_and_come_back(groups: int, seed: int) -> None:
    codes = random_codes(seed, (2, 8 * groups), 4)
    packed = words.pack_interleaved(codes)
    np.testing.assert_array_equal(packed, oracle.pack_awq(codes))
    np.testing.assert_array_equal(words.unpack_interleaved(packed), codes)


@pytest.mark.parametrize(
    ("bits", "first", "second"),
    [(2, 0x55555555, 0xAAAAAAAA), (4, 0x77777777, 0x88888888), (8, 0x7F7F7F7F, 0x80808080)],
)
def test_golden_words_of_symmetric_zeros(bits: int, first: int, second: int) -> None:
    zeros = np.full((1, 32 // bits), 2 ** (bits - 1), np.uint8)
    assert words.pack_words(words.lower_zeros(zeros, bits), bits).view(np.uint32).tolist() == [[first]]
    assert words.pack_words(zeros, bits).view(np.uint32).tolist() == [[second]]


@pytest.mark.parametrize("bits", range(1, 9))
def test_lowered_zeros_come_back_without_touching_a_neighbour(bits: int) -> None:
    zeros = np.arange(2**bits).astype(np.uint8)
    lowered = words.lower_zeros(zeros, bits)
    assert lowered.max() == 2**bits - 1
    np.testing.assert_array_equal(words.raise_zeros(lowered, bits), zeros)
