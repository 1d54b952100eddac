"""How attention over packed caches is divided: a rule by the shapes, from measurements on an H100."""

import dataclasses
import functools
import math
from typing import Final

from pallas_kernels import flash
from pallas_kernels.attention_kernel import AttentionConfig
from pallas_kernels.decode_rules import MULTIPROCESSORS, ONE_BLOCK

FEWEST_BITS: Final = 4  # of a code
EXACT: Final = 16  # bits of bfloat16, whose tiles in runs are the faster: 178.5 us, 179.5 in turns (16 x 8192)
WARPGROUPS: Final = (4, 2, 1)  # of a block, the most that fit: four have 128 registers a thread, a multiprocessor each
TILES: Final = (128, 64)
WIDE_TILE: Final = 256  # of KIVI: a warp multiplies the keys' grid once for 64 tokens
LEAST_GROUP_OF_WIDE: Final = 64
MOST_STAGES: Final = 4
MOST_SPLITS: Final = 64
LEAST_TILES: Final = 2  # of a warpgroup: fewer are not worth a block
BYTES_OF_GRIDS: Final = 8  # of a token's head
WIDEST: Final = 256  # numbers of a head: never measured with few tokens
NARROW: Final = 64  # numbers of a head, up to which one warpgroup a block is the faster
BLOCKS_OF_NARROW: Final = 2  # of a multiprocessor
STAGES_OF_KIVI: Final = 2
LEAST_GROUP: Final = 32  # tokens or channels of a grid of KIVI's
MOST_BYTES_OF_KIVI_GRIDS: Final = 8  # of a key's grid and a value's
COST_OF_BLOCK: Final = 3.0  # in tiles of a warpgroup: what starting and ending a block takes
COST_OF_JOIN: Final = 2.5  # likewise, a second kernel
FEW: Final = 2 * MULTIPROCESSORS  # tiles in all, up to which blocks of one warpgroup and two tiles are the fastest
SPLITS_OF_FEW: Final = 16  # more take longer to join
FEW_TILES: Final = 16  # of a warpgroup: as far as two copies of 4-bit codes under way were timed, 53.4 us; three take
AHEAD_OF_FEW: Final = 2  # 55.9, as the first tile comes later (16 x 8000 tokens and the new one, H100, 2026-11-23)
SHORT: Final = 4  # tiles of a warpgroup, up to which smaller ones end earlier: their last step is shorter


@functools.cache
def choose_attention(
    bits: int, rows: int, kv_heads: int, dim: int, tokens: int, page: int | None = None
) -> AttentionConfig:
    """Returns a configuration that fills the multiprocessors evenly.

    Args:
      bits: of a code; 16 for bfloat16.
      rows: of the batch.
      kv_heads: heads of the cache.
      dim: numbers of a head.
      tokens: that the longest row may have.
      page: tokens of a page; None for one page a row.

    Example:
      >>> choose_attention(4, 16, 8, 128, 8192)
      AttentionConfig(splits=1, tile=128, stages=2, warpgroups=4, tiles='in turns')
      >>> choose_attention(4, 1, 8, 128, 32768)
      AttentionConfig(splits=16, tile=64, stages=4, warpgroups=4, tiles='in turns')
      >>> choose_attention(4, 1, 8, 128, 2048)
      AttentionConfig(splits=8, tile=128, stages=2, warpgroups=1, tiles='in turns')
    """
    found = _choose_attention(bits, rows, kv_heads, dim, tokens, page or tokens)
    return dataclasses.replace(found, tiles="in runs") if bits == EXACT else found


def _choose_attention(bits: int, rows: int, kv_heads: int, dim: int, tokens: int, page: int) -> AttentionConfig:
    if dim <= NARROW and page % TILES[0] == 0:
        splits = _splits(rows * kv_heads, -(-tokens // TILES[0]), BLOCKS_OF_NARROW * MULTIPROCESSORS, 1)
        return AttentionConfig(splits, TILES[0], MOST_STAGES if bits < EXACT else 2, 1)
    few = rows * kv_heads * -(-tokens // TILES[0]) <= FEW
    if few and dim < WIDEST:
        tile = next((each for each in TILES[bits == EXACT :] if page % each == 0 or each % page == 0), TILES[-1])
        tiles = -(-tokens // tile)
        return AttentionConfig(max(1, min(SPLITS_OF_FEW, tiles // LEAST_TILES)), tile, 2, 1)
    smallest = (_stages(bits, dim, page, TILES[-1], each) for each in WARPGROUPS)
    warpgroups = next((each for each, stages in zip(WARPGROUPS, smallest, strict=True) if stages > 0), WARPGROUPS[0])
    fitting = {tile: _stages(bits, dim, page, tile, warpgroups) for tile in TILES}
    tile = next((each for each in TILES if fitting[each] >= 2), TILES[-1])
    splits = _splits(rows * kv_heads, -(-tokens // tile), MULTIPROCESSORS, warpgroups)
    each = -(-tokens // (tile * splits * warpgroups))
    if each <= SHORT and fitting[TILES[-1]] >= 2:
        tile = TILES[-1]
    stages = fitting[tile]
    if bits == FEWEST_BITS and tile == TILES[0] and each <= FEW_TILES:
        stages = min(stages, AHEAD_OF_FEW)
    return AttentionConfig(splits, tile, max(1, stages), warpgroups)


def _stages(bits: int, dim: int, page: int, tile: int, warpgroups: int) -> int:
    """Returns how many copies of a tile have room in each warpgroup; 0 where none has, or pages do not suit it."""
    row, to_meet = dim * bits // 8, flash.bytes_to_meet(dim)
    room = ONE_BLOCK - 4 * (warpgroups - 1) * math.prod(flash.shape_of_result(dim))
    one = tile * (2 * row + (0 if bits == EXACT else BYTES_OF_GRIDS))
    stages = min(MOST_STAGES, room // (warpgroups * one))
    if stages * tile * row < to_meet:  # these need memory of their own
        stages = min(stages, (room - warpgroups * to_meet) // (warpgroups * one))
    return max(0, stages) if page % tile == 0 or tile % page == 0 else 0


@functools.cache
def choose_kivi(
    bits: int,
    rows: int,
    kv_heads: int,
    dim: int,
    tokens: int,
    group: int = LEAST_GROUP,
) -> AttentionConfig:
    """Returns a configuration for KIVI's caches: as many warpgroups as the shared memory has room for.

    Args:
      bits: of a code.
      rows: of the batch.
      kv_heads: heads of the cache.
      dim: numbers of a head.
      tokens: coded ones that the longest row may have.
      group: tokens or channels of a grid.

    Example:
      >>> choose_kivi(2, 16, 8, 128, 32768)
      AttentionConfig(splits=1, tile=128, stages=2, warpgroups=4, tiles='in turns')
    """
    wide = group >= LEAST_GROUP_OF_WIDE and tokens % WIDE_TILE == 0
    tile = WIDE_TILE if wide else TILES[0]
    grids = MOST_BYTES_OF_KIVI_GRIDS * dim // (group if wide else LEAST_GROUP)
    one = tile * (2 * dim * bits // 8 + grids)
    result = 4 * math.prod(flash.shape_of_result(dim))
    room = ONE_BLOCK // (STAGES_OF_KIVI * one + flash.bytes_to_meet(dim) + result)
    warpgroups = max(1, min(WARPGROUPS[0], room))
    splits = _splits(rows * kv_heads, -(-tokens // tile), MULTIPROCESSORS, warpgroups)
    return AttentionConfig(splits, tile, STAGES_OF_KIVI, warpgroups)


def _splits(heads: int, tiles: int, slots: int, warpgroups: int) -> int:
    """Returns how many blocks should share a head's tiles, where so many run at once."""

    def cost(splits: int) -> float:
        waves = -(-heads * splits // slots)
        return waves * (-(-tiles // (splits * warpgroups)) + COST_OF_BLOCK) + (COST_OF_JOIN if splits > 1 else 0.0)

    most = max(1, min(MOST_SPLITS, tiles // (warpgroups * LEAST_TILES)))
    return min(range(1, most + 1), key=cost)
