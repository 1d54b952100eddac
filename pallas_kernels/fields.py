"""Codes of 2, 3 and 4 bits in 4-byte words, so placed that few instructions make them the tensor cores' operands.

Words are stored as int4 arrays [out, in * bits / 4], eight numbers to a word, which threads load as they load int4
codes: 32 neighbouring numbers of a row are one word for each of the four threads t that share the row.

Signs (binary codes; operand int8): a thread's operand is four neighbouring inputs, 16 j + 4 t + 0..3 of a block j, and
each input has one byte of the word. Bit p of that byte, masked, is the operand 2^p of plane p's sign, with no shift;
planes of other blocks lie above and want one shift for all of them:

    4 bits   one word for 2 blocks:     byte = block 1's planes 3210 | block 0's planes 3210
    2 bits   one word for 4 blocks:     byte = 10 | 10 | 10 | 10 of blocks 3, 2, 1, 0
    3 bits   three words for 8 blocks:  byte of word i = two bits of block 6 or 7 | 210 of block 2 i + 1 | 210 of 2 i
             where the two bits (7, 6) are, word by word: (6's plane 1, 6's 0), (7's 0, 6's 2), (7's 2, 7's 1)

Threes (3-bit codes; operand bfloat16): a thread's operand is pairs of inputs, 8 j + 2 t + 0..1 of a pair of columns j,
an input for each half word. 3 bits are the last of the mantissa of 128: 128 + code, by one shift and one mask. A half
word holds 5 codes and one bit; the bits of three words are one more code: 16 pairs, 128 inputs, in 3 words.

Both are exact and reversible.
"""

from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int8

BLOCK: Final = 16  # inputs of a row that fill one register of each of its four threads, int8
WORDS: Final = {2: 1, 3: 3, 4: 1}  # words of a run, by the number of planes
BLOCKS: Final = {2: 4, 3: 8, 4: 2}  # blocks of a run
SPREAD: Final = {(6, 0): (0, 6), (6, 1): (0, 7), (6, 2): (1, 6), (7, 0): (1, 7), (7, 1): (2, 6), (7, 2): (2, 7)}
THREES: Final = 128  # inputs of a run of 3-bit codes
FIELDS: Final = 5  # 3-bit codes in a half word


def places_of_signs(bits: int) -> dict[tuple[int, int], tuple[int, int]]:
    """Returns (word, bit of the byte) of each (block, plane) of a run.

    Example:
      >>> places_of_signs(4)[1, 2]
      (0, 6)
    """
    if bits == 3:
        whole = {(block, plane): (block // 2, block % 2 * 3 + plane) for block in range(6) for plane in range(3)}
        return whole | SPREAD
    return {(block, plane): (0, bits * block + plane) for block in range(BLOCKS[bits]) for plane in range(bits)}


def store_signs(codes: Int[Array, "out in"], bits: int) -> Int[Array, "out stored"]:
    """Returns int4 words of codes whose bit p is plane p's sign, 0 to 2^bits - 1."""
    rows, run = len(codes), BLOCK * BLOCKS[bits]
    inputs = codes.astype(jnp.int32).reshape(rows, -1, BLOCKS[bits], 4, 4)  # run, block, thread, byte
    words = [jnp.zeros((rows, codes.shape[1] // run, 4, 4), jnp.int32) for _ in range(WORDS[bits])]
    for (block, plane), (word, bit) in places_of_signs(bits).items():
        words[word] = words[word] | ((inputs[:, :, block] >> plane) & 1) << bit
    return _nibbles(jnp.stack(words, axis=2), 2).reshape(rows, -1)


def load_signs(stored: Int[Array, "out stored"], bits: int) -> Int8[Array, "out in"]:
    """Returns the codes that `store_signs` was given."""
    places = places_of_signs(bits)
    numbers = _numbers(stored.reshape(len(stored), -1, WORDS[bits], 4, 4, 2))
    blocks = []
    for block in range(BLOCKS[bits]):
        found = [(places[block, plane], plane) for plane in range(bits)]
        blocks.append(sum((((numbers[:, :, word] >> bit) & 1) << plane for (word, bit), plane in found)))
    return jnp.stack(blocks, axis=2).astype(jnp.int8).reshape(len(stored), -1)


def store_threes(codes: Int[Array, "out in"]) -> Int[Array, "out stored"]:
    """Returns int4 words of codes 0 to 7."""
    pairs = codes.astype(jnp.int32).reshape(len(codes), -1, 16, 4, 2)  # run, pair of columns, thread, half word
    words = []
    for word in range(3):
        value = ((pairs[:, :, 15] >> word) & 1) << 15
        for field in range(FIELDS):
            value = value | pairs[:, :, FIELDS * word + field] << (3 * field)
        words.append(value)
    return _nibbles(jnp.stack(words, axis=2), 4).reshape(len(codes), -1)


def load_threes(stored: Int[Array, "out stored"]) -> Int8[Array, "out in"]:
    """Returns the codes that `store_threes` was given."""
    numbers = _numbers(stored.reshape(len(stored), -1, 3, 4, 2, 4))
    pairs = [(numbers[:, :, pair // FIELDS] >> (3 * (pair % FIELDS))) & 7 for pair in range(15)]
    top = [((numbers[:, :, word] >> 15) & 1) << word for word in range(3)]
    pairs.append(top[0] | top[1] | top[2])
    return jnp.stack(pairs, axis=2).astype(jnp.int8).reshape(len(stored), -1)


def _nibbles(numbers: jax.Array, count: int) -> jax.Array:
    """Splits whole numbers into int4, the lowest first, along a new last axis."""
    split = jnp.stack([(numbers >> (4 * i)) & 15 for i in range(count)], axis=-1)
    return jnp.where(split > 7, split - 16, split).astype(jnp.int4)


def _numbers(nibbles: jax.Array) -> jax.Array:
    """Joins int4 along the last axis into whole numbers."""
    wide = nibbles.astype(jnp.int32) & 15
    return sum((wide[..., i] << (4 * i) for i in range(wide.shape[-1])), jnp.zeros((), jnp.int32))
