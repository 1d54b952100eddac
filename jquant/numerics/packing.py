"""Dense bit streams: integer codes of 1 to 8 bits in bytes, without a gap.

Along the input axis, code i takes the bits [i b, (i + 1) b) of a little-endian stream: bit t of the stream is bit t mod
8 of byte t // 8. For 4 bits this puts code 0 in the low half of byte 0. The same bytes read as little-endian 32-bit
words are GPTQ's `qweight`, 3 bits included. The stream repeats its alignment every 8 / gcd(8, b) codes, so both
directions are a few shifts on a reshaped array.
"""

import math
from typing import Final

import jax.numpy as jnp
from jaxtyping import Array, Integer, UInt8

from jquant.errors import FormatError

BYTE: Final = 8  # bits in a byte


def packed_length(count: int, bits: int) -> int:
    """Return the number of bytes that hold `count` codes: ceil(count * bits / 8).

    Args:
        count: number of codes.
        bits: width of a code, 1 to 8.

    Raises:
        FormatError: if `bits` is not in 1..8.

    Example:
        >>> packed_length(10, 3)
        4
    """
    if not 1 <= bits <= BYTE:
        raise FormatError(f"codes of {bits} bits given; a packed code has 1 to 8 bits: choose `bits` in that range")
    return -(-count * bits // BYTE)


def pack(codes: Integer[Array, "*batch n out"], bits: int) -> UInt8[Array, "*batch bytes out"]:
    """Pack codes along the axis before the last into a dense little-endian bit stream.

    Bits above `bits` are dropped, so a code outside 0..2^bits - 1 wraps and never touches its neighbours: clip first.
    The last byte is filled with zeros.

    Args:
        codes: integers in 0..2^bits - 1, `[*batch, n, out]`.
        bits: width of a code, 1 to 8.

    Returns:
        Bytes `[*batch, ceil(n * bits / 8), out]`.

    Raises:
        FormatError: if `bits` is not in 1..8.

    Example:
        >>> pack(jnp.array([[15], [9], [0]]), bits=4).tolist()
        [[159], [0]]
    """
    *batch, count, out = codes.shape
    length = packed_length(count, bits)
    block_codes, block_bytes = _block(bits)
    blocks = -(-count // block_codes)
    fields = codes.astype(jnp.uint8) & jnp.uint8(2**bits - 1)
    fields = _pad_rows(fields, blocks * block_codes).reshape(*batch, blocks, block_codes, out)
    packed = jnp.stack([_gather_byte(fields, byte, bits) for byte in range(block_bytes)], axis=-2)
    return packed.reshape(*batch, blocks * block_bytes, out)[..., :length, :]


def unpack(packed: UInt8[Array, "*batch bytes out"], bits: int, count: int) -> UInt8[Array, "*batch {count} out"]:
    """Unpack `count` codes from a dense little-endian bit stream; the inverse of `pack`.

    Args:
        packed: bytes `[*batch, ceil(count * bits / 8), out]`.
        bits: width of a code, 1 to 8.
        count: number of codes along the packed axis.

    Returns:
        Codes in 0..2^bits - 1, `[*batch, count, out]`.

    Raises:
        FormatError: if `bits` is not in 1..8, or the number of bytes is not that of `count` codes.

    Example:
        >>> unpack(jnp.array([[159], [0]], dtype=jnp.uint8), bits=4, count=3).tolist()
        [[15], [9], [0]]
    """
    *batch, length, out = packed.shape
    if length != packed_length(count, bits):
        raise FormatError(
            f"{length} bytes given for {count} codes of {bits} bits, which take {packed_length(count, bits)}: "
            "pass the count and bits that the codes were packed with"
        )
    block_codes, block_bytes = _block(bits)
    blocks = -(-count // block_codes)
    stream = _pad_rows(packed, blocks * block_bytes).reshape(*batch, blocks, block_bytes, out)
    codes = jnp.stack([_extract_code(stream, code, bits) for code in range(block_codes)], axis=-2)
    return codes.reshape(*batch, blocks * block_codes, out)[..., :count, :]


def _block(bits: int) -> tuple[int, int]:
    """Return the codes and the bytes after which the stream is aligned again."""
    common = math.gcd(BYTE, bits)
    return BYTE // common, bits // common


def _pad_rows(array: UInt8[Array, "*batch n out"], rows: int) -> UInt8[Array, "*batch {rows} out"]:
    missing = rows - array.shape[-2]
    return jnp.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, missing), (0, 0)])


def _gather_byte(fields: UInt8[Array, "*block codes out"], byte: int, bits: int) -> UInt8[Array, "*block out"]:
    """Collect one byte of each block from the codes that overlap it."""
    first, last = byte * BYTE // bits, ((byte + 1) * BYTE - 1) // bits
    result = jnp.zeros_like(fields[..., 0, :])
    for code in range(first, last + 1):
        shift = code * bits - byte * BYTE
        field = fields[..., code, :]
        result |= field << jnp.uint8(shift) if shift >= 0 else field >> jnp.uint8(-shift)
    return result


def _extract_code(stream: UInt8[Array, "*block bytes out"], code: int, bits: int) -> UInt8[Array, "*block out"]:
    """Read one code of each block from the one or two bytes that hold it."""
    byte, shift = divmod(code * bits, BYTE)
    field = stream[..., byte, :] >> jnp.uint8(shift)
    if shift + bits > BYTE:
        field |= stream[..., byte + 1, :] << jnp.uint8(BYTE - shift)
    return field & jnp.uint8(2**bits - 1)
