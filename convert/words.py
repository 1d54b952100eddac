"""Codes in 32-bit words, as compressed-tensors, GPTQ and AWQ lay them in files. Integers alone, in numpy.

dense        element i takes the bits [i b, (i + 1) b) of a little-endian stream of words; the last word is filled with
             zeros. compressed-tensors from 0.18 on, along inputs (weights) and outputs (zeros); GPTQ the same, with the
             words of a weight along its first axis. It is the stream of `jquant.numerics.packing`, whose bytes are
             regrouped without touching a bit.
zeros of v1  GPTQ's first version stores z - 1 modulo 2^b for a zero z; its second stores z.
interleaved  AWQ: eight codes of 4 bits a word, output 8 w + _INTERLEAVED[j] in the bits [4 j, 4 j + 4) of word w.
"""

from typing import Final

import numpy as np
from jaxtyping import Int32, UInt8

WORD: Final = 32  # bits in a word
_BYTES: Final = 4  # in a word
_BYTE: Final = 8  # bits
_NIBBLE: Final = 4  # AWQ's GEMM kernels know 4 bits alone
_INTERLEAVED: Final = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ, `WQLinear_GEMM.from_linear`: order_map


def word_count(count: int, bits: int) -> int:
    """Returns how many words `count` codes take.

    >>> word_count(11, bits=3)
    2
    """
    return -(-count * bits // WORD)


def words_of_bytes(stream: UInt8[np.ndarray, "bytes out"]) -> Int32[np.ndarray, "words out"]:
    """Regroups a byte stream along the first axis into words; the last word is filled with zeros.

    Example:
      >>> words_of_bytes(np.array([[1], [2], [0], [0], [3]], np.uint8)).tolist()
      [[513], [3]]
    """
    length, outputs = stream.shape
    words = -(-length // _BYTES)
    padded = np.zeros((outputs, words * _BYTES), np.uint8)
    padded[:, :length] = stream.T
    return np.ascontiguousarray(padded.view("<i4").astype(np.int32, copy=False).T)


def bytes_of_words(words: Int32[np.ndarray, "words out"], length: int) -> UInt8[np.ndarray, "{length} out"]:
    """Returns the first `length` bytes of a stream of words along the first axis; the inverse of `words_of_bytes`."""
    stream = np.ascontiguousarray(words.T).astype("<i4", copy=False).view(np.uint8)
    return np.ascontiguousarray(stream[:, :length].T)


def pack_words(codes: UInt8[np.ndarray, "rows n"], bits: int) -> Int32[np.ndarray, "rows words"]:
    """Packs codes along the last axis, densely.

    Args:
      codes: integers in 0..2^bits - 1; higher bits are dropped.
      bits: width of a code, 1 to 8.

    Example:
      >>> hex(pack_words(np.array([[15, 9, 0, 10, 6, 1, 15, 9]], np.uint8), 4).view(np.uint32)[0, 0])
      '0x9f16a09f'
    """
    rows, count = codes.shape
    if bits == _BYTE:
        return np.ascontiguousarray(words_of_bytes(np.ascontiguousarray(codes.T)).T)
    single = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little").reshape(rows, count * bits)
    packed = np.packbits(single, axis=-1, bitorder="little")
    return np.ascontiguousarray(words_of_bytes(np.ascontiguousarray(packed.T)).T)


def unpack_words(words: Int32[np.ndarray, "rows words"], bits: int, count: int) -> UInt8[np.ndarray, "rows {count}"]:
    """Returns the first `count` codes along the last axis; the inverse of `pack_words`."""
    stream = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == _BYTE:
        return np.ascontiguousarray(stream[:, :count])
    single = np.unpackbits(stream, axis=-1, count=count * bits, bitorder="little")
    return np.packbits(single.reshape(len(words), count, bits), axis=-1, bitorder="little")[..., 0]


def lower_zeros(zeros: UInt8[np.ndarray, "*shape"], bits: int) -> UInt8[np.ndarray, "*shape"]:
    """Returns z - 1 modulo 2^bits, what GPTQ's first version stores for a zero z.

    >>> lower_zeros(np.array([8, 0], np.uint8), bits=4).tolist()
    [7, 15]
    """
    return (zeros - np.uint8(1)) & np.uint8(2**bits - 1)


def raise_zeros(stored: UInt8[np.ndarray, "*shape"], bits: int) -> UInt8[np.ndarray, "*shape"]:
    """Returns stored + 1 modulo 2^bits, each zero alone: the inverse of `lower_zeros`."""
    return (stored + np.uint8(1)) & np.uint8(2**bits - 1)


def pack_interleaved(codes: UInt8[np.ndarray, "rows out"]) -> Int32[np.ndarray, "rows words"]:
    """Packs codes of 4 bits along the last axis in AWQ's order; their number is a multiple of 8.

    >>> hex(pack_interleaved(np.arange(8, dtype=np.uint8)[None])[0, 0])
    '0x75316420'
    """
    rows, outputs = codes.shape
    eight = len(_INTERLEAVED)
    ordered = codes.reshape(rows, outputs // eight, eight)[..., _INTERLEAVED]
    return pack_words(np.ascontiguousarray(ordered.reshape(rows, outputs)), _NIBBLE)


def unpack_interleaved(words: Int32[np.ndarray, "rows words"]) -> UInt8[np.ndarray, "rows out"]:
    """Returns the codes of AWQ's words; the inverse of `pack_interleaved`."""
    rows, count = words.shape
    eight = len(_INTERLEAVED)
    ordered = unpack_words(words, _NIBBLE, count * eight).reshape(rows, count, eight)
    codes = np.empty_like(ordered)
    codes[..., _INTERLEAVED] = ordered
    return codes.reshape(rows, count * eight)
