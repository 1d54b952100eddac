"""What warps that walk a packed cache have in common: queries as operands, running softmax, how they meet.

One KV head's query heads (at most 8) are the columns of both products, the cache is their operand A [16 rows, 16 deep],
unpacked in registers (`flash_tokens`, `flash_kivi`); a warp walks tokens of its own and meets the others once, at the
end:

    S [16 tokens, 8 heads] = K [tokens, dim] Q^T [dim, heads]           rows are tokens
    O^T [dim, 8 heads]    += V^T [dim, tokens] P [tokens, heads]        rows are numbers of a head

No number passes between threads but P, which `Lanes.transpose` turns from the layout of S into that of an operand.
Which number of a head is which row or column of a product is free, so that bytes are read as they lie: a thread's part
of a key's bytes is one piece, and so is its part of a value's. The n-th of these lies in group n // (group / 8), there
at (group / 8) row + n % (group / 8); `group` neighbours share a grid, or all do.

Online softmax: each warp has a maximum m for each head, in powers of two, and rescales O when it grows. A warp's state
is an array of the layout C: tiles of O, then three: sums that correct O, (m, total), others that correct O.
"""

import math
import struct
from collections.abc import Sequence
from typing import Any, Final

from pallas_kernels.lanes import HIGH_HALVES, LOW_HALVES, Lanes, Registers, Value

HEADS: Final = 8  # query heads of a KV head, padded: columns of the instruction
GROUP: Final = 16  # tokens of one instruction
WARPS: Final = 4
NUMBERS_OF_TILE: Final = 4  # of a thread, of a tile [16, 8]
ENDS: Final = 3  # tiles behind those of O
ONES: Final = 0x3F803F80  # 1, twice
NEVER: Final = -1e30  # score of a token that is not there
LEAST: Final = -1e25  # where a maximum begins: above NEVER times any scale of scores, below all others
TINY: Final = 2.0**-126  # least total: that of a row without tokens is 0
TREE: Final = (4, 8, 16)  # distances of lanes that share a quad


def shape_of_queries(dim: int) -> tuple[int, int]:
    """Returns the shape of the queries' words, as an array of the layout C."""
    return 64, dim // 4


def shape_of_state(dim: int) -> tuple[int, int]:
    """Returns the shape of what a warp carries."""
    return 64, 8 * (dim // GROUP + ENDS)


def shape_of_result(dim: int) -> tuple[int, int]:
    """Returns the shape of what `meet` gives."""
    return 64, 8 * (dim // GROUP // WARPS + 1)


def bytes_to_meet(dim: int) -> int:
    """Returns the bytes of shared memory that `meet` needs: O of four warps, their maxima, totals and corrections."""
    return 4 * (32 * WARPS * NUMBERS_OF_TILE * dim // GROUP + (2 + HEADS) * WARPS * HEADS)


def begin(lanes: Lanes, queries: Any, dim: int, share: int, apart: int) -> list[Registers]:
    """Returns queries as operands, their sums [64, 8], and the state before the first token.

    Args:
      lanes: the operations.
      queries: a reference to bfloat16 [share, dim].
      dim: numbers of a head.
      share: query heads of a KV head.
      apart: how far the two numbers of an operand's word lie apart: half as far as a stored word's reach.
    """
    head = lanes.least(lanes.row, share - 1)
    chunk = dim // 4
    place = lanes.offset(0, (head, 2 * dim), (lanes.quad, 2 * chunk))
    words, pairs = lanes.load(queries, place, chunk // 2), []
    for start in range(0, chunk, 2 * apart):
        for a in range(start, start + apart):
            low, high = words[a // 2], words[(a + apart) // 2]
            pairs.append(low if apart == 1 else lanes.pick(low, high, HIGH_HALVES if a % 2 else LOW_HALVES))
    sums, zero = [lanes.number(0.0)] * 4, lanes.number(0.0)
    for a in range(0, len(pairs), 2):
        sums = lanes.mma([lanes.word(ONES)] * 4, pairs[a : a + 2], sums)
    nothing = [[zero, zero], [zero, zero]]
    least = [[lanes.number(LEAST)] * 2, [zero, zero]]
    state = [*([nothing] * (dim // GROUP + 1)), least, nothing]
    operands = [[pairs[i : i + 2], pairs[i + 2 : i + 4]] for i in range(0, len(pairs), NUMBERS_OF_TILE)]
    return [operands, [[sums[:2], [zero, zero]]], state]


def twice(value: float) -> int:
    """Returns the word that holds a number twice in bfloat16, which has it exactly.

    Example:
      >>> hex(twice(1.0)), hex(twice(-1.375))
      ('0x3f803f80', '0xbfb0bfb0')
    """
    (word,) = struct.unpack("<I", struct.pack("<f", value))
    half = word >> 16
    assert struct.unpack("<f", struct.pack("<I", half << 16)) == (value,)
    return int(half << 16 | half)


def flat(tiles: Registers) -> list[Value]:
    """Returns the numbers of tiles in a row, four of each."""
    return [number for tile in tiles for pair in tile for number in pair]


def tiled(numbers: list[Value]) -> Registers:
    """Returns tiles of numbers in a row."""
    return [[numbers[i : i + 2], numbers[i + 2 : i + 4]] for i in range(0, len(numbers), NUMBERS_OF_TILE)]


def raise_maximum(
    lanes: Lanes, scores: list[list[Value]], state: Registers, dim: int
) -> tuple[list[list[Value]], list[Value], Registers]:
    """Returns the weights P of new scores, the new maximum, and the state rescaled to it, totals with P in them.

    Args:
      lanes: the operations.
      scores: of the new tokens, row by row, for two heads.
      state: before them.
      dim: numbers of a head.
    """
    scale = lanes.number(math.log2(math.e) / math.sqrt(dim))
    m, total = state[-2]
    new = [lanes.larger(m[i], lanes.multiply(_largest(lanes, [row[i] for row in scores]), scale)) for i in range(2)]
    shrink = [lanes.exp2(lanes.subtract(m[i], new[i])) for i in range(2)]
    down = [lanes.subtract(lanes.number(0.0), new[i]) for i in range(2)]
    weights = [[lanes.exp2(lanes.fma(row[i], scale, down[i])) for i in range(2)] for row in scores]
    total = [lanes.multiply(total[i], shrink[i]) for i in range(2)]
    for row in weights:
        total = [lanes.add(total[i], row[i]) for i in range(2)]
    rescaled = [[[lanes.multiply(pair[i], shrink[i]) for i in range(2)] for pair in tile] for tile in state]
    rescaled[-2] = [new, total]
    return weights, new, rescaled


def token_rows(lanes: Lanes, start: int, own: int) -> list[Value]:
    """Returns the two tokens of a tile that are a thread's rows of an operand: of a warp's `own`, 16 from `start` on.

    Rows 4 to 7 of 8 are swapped in pairs, so that threads that load values of different tokens find other banks.
    """
    place = lanes.xor(lanes.row, lanes.field(lanes.row, 2, 1, 0))
    return [lanes.offset(start + 8 * half, (lanes.warp, own), (place, 1)) for half in range(2)]


def token_pairs(lanes: Lanes, start: int, own: int) -> list[list[Value]]:
    """Returns the four tokens that are a thread's depths of an operand, in pairs; see `token_rows`."""
    flip = lanes.field(lanes.quad, 1, 1, 0)
    places = [lanes.xor(lanes.offset(e, (lanes.quad, 2)), flip) for e in range(2)]
    return [[lanes.offset(start + 8 * half, (lanes.warp, own), (place, 1)) for place in places] for half in range(2)]


def total_of_quads(lanes: Lanes, value: Value) -> Value:
    """Returns the sum over the lanes that share a quad."""
    for distance in TREE:
        value = lanes.add(value, lanes.shuffle(value, distance))
    return value


def meet(
    lanes: Lanes, exchange: Any, outputs: list[list[Value]], ends: Sequence[list[Value]], per_group: int
) -> list[Registers]:
    """Returns the sum over the four warps: each has a quarter of O, and a tile of the maximum and the total.

    Args:
      lanes: the operations.
      exchange: `bytes_to_meet` bytes of shared memory.
      outputs: tiles of O.
      ends: a warp's maxima, its threads' own totals, and what to add to O for each of `row`'s groups.
      per_group: numbers of a thread that share a group.
    """
    m, parts, lows = ends
    tiles = len(outputs)
    maxima = 4 * 32 * WARPS * NUMBERS_OF_TILE * tiles
    totals = maxima + 4 * WARPS * HEADS
    groups = totals + 4 * WARPS * HEADS
    mine = (lanes.warp, 4 * HEADS), (lanes.quad, 8)
    for i in range(2):
        lanes.store(exchange, lanes.offset(maxima + 4 * i, *mine), m[i])
    lanes.barrier()
    top = [lanes.number(LEAST)] * 2
    for warp in range(WARPS):
        words = lanes.load(exchange, lanes.offset(maxima + 4 * HEADS * warp, (lanes.quad, 8)), 2)
        top = [lanes.larger(top[i], lanes.floats(words[i])) for i in range(2)]
    share = [lanes.exp2(lanes.subtract(m[i], top[i])) for i in range(2)]
    thread = (lanes.warp, 128), (lanes.row, 16), (lanes.quad, 4)
    for index, value in enumerate(flat_numbers(outputs)):
        lanes.store(exchange, lanes.offset(512 * index, *thread), lanes.multiply(value, share[index % 2]))
    for i in range(2):
        part = lanes.multiply(total_of_quads(lanes, parts[i]), share[i])
        lanes.store(exchange, lanes.offset(totals + 4 * i, *mine), part)
        place = lanes.offset(groups + 4 * i, (lanes.warp, 4 * HEADS * HEADS), (lanes.row, 4 * HEADS), (lanes.quad, 8))
        lanes.store(exchange, place, lanes.multiply(lows[i], share[i]))
    lanes.barrier()

    def gathered(start: int, stride: int, *terms: tuple[Value, int]) -> Value:
        words = [lanes.load(exchange, lanes.offset(start + stride * w, *terms), 1)[0] for w in range(WARPS)]
        return _added(lanes, [lanes.floats(word) for word in words])

    result = []
    for tile in range(tiles // WARPS):
        for i in range(4):
            value = gathered(512 * (4 * tile + i), 128, (lanes.warp, 512 * tiles), *thread[1:])
            number = lanes.offset(2 * tile + i // 2, (lanes.warp, 2 * tiles // WARPS))
            group = lanes.field(number, per_group.bit_length() - 1, 0xFF, 0)
            low = gathered(groups + 4 * (i % 2), 4 * HEADS * HEADS, (group, 4 * HEADS), (lanes.quad, 8))
            result.append(lanes.add(value, low))
    total = [gathered(totals + 4 * i, 4 * HEADS, (lanes.quad, 8)) for i in range(2)]
    return [[*tiled(result), [top, total]]]


def flat_numbers(tiles: list[list[Value]]) -> list[Value]:
    """Returns the numbers of tiles in a row."""
    return [number for tile in tiles for number in tile]


def join(lanes: Lanes, _: Sequence[Any], registers: Sequence[Registers]) -> list[Registers]:
    """Returns the sum of several results of `meet`."""
    top, share = registers[0][-1][0], []
    for each in registers[1:]:
        top = [lanes.larger(top[i], each[-1][0][i]) for i in range(2)]
    for each in registers:
        share.append([lanes.exp2(lanes.subtract(each[-1][0][i], top[i])) for i in range(2)])
    joined = []
    for index in range(len(flat(registers[0]))):
        parts = [lanes.multiply(flat(each)[index], factor[index % 2]) for each, factor in zip(registers, share)]
        joined.append(_added(lanes, parts))
    tiles = tiled(joined)
    return [[*tiles[:-1], [top, tiles[-1][1]]]]


def join_pieces(lanes: Lanes, _: Sequence[Any], registers: Sequence[Registers]) -> list[Registers]:
    """Returns the sum of pieces of several results: of each a tile of its numbers and its last one, in turn."""
    tiles = [tile for each in registers for tile in each]
    return join(lanes, _, [tiles[i : i + 2] for i in range(0, len(tiles), 2)])


def write(
    lanes: Lanes,
    refs: Sequence[Any],
    registers: Sequence[Registers],
    shape: tuple[int, int],
    group: int,
    piece: tuple[int, int],
) -> list[Registers]:
    """Stores the result of `meet` or `join`, divided by the total, in a reference to bfloat16 [share, dim].

    Args:
      lanes: the operations.
      refs: the reference.
      registers: the result.
      shape: (share, dim).
      group: neighbours that share a grid, by which numbers are ordered.
      piece: which one of how many the result is.
    """
    (share, dim), per_group, (which_piece, pieces) = shape, group // 8, piece
    *tiles, (_, total) = registers[0]
    factor = [lanes.reciprocal(lanes.larger(total[i], lanes.number(TINY))) for i in range(2)]
    for index, tile in enumerate(tiles):
        number = lanes.offset(2 * (which_piece * len(tiles) + index), (lanes.warp, 2 * pieces * len(tiles)))
        which = lanes.field(number, per_group.bit_length() - 1, 0xFF, 0)
        inside = lanes.field(number, 0, per_group - 1, 0)
        for i in range(2):
            word = lanes.pack(*(lanes.multiply(tile[half][i], factor[i]) for half in range(2)))
            head = lanes.offset(i, (lanes.quad, 2))
            place = lanes.offset(0, (head, 2 * dim), (which, 2 * group), (lanes.row, 2 * per_group), (inside, 2))
            lanes.store_word(refs[0], place, word, lanes.below(head, lanes.word(share)))
    return []


def _largest(lanes: Lanes, values: list[Value]) -> Value:
    top = values[0]
    for value in values[1:]:
        top = lanes.larger(top, value)
    for distance in TREE:
        top = lanes.larger(top, lanes.shuffle(top, distance))
    return top


def _added(lanes: Lanes, values: list[Value]) -> Value:
    total = values[0]
    for value in values[1:]:
        total = lanes.add(total, value)
    return total
