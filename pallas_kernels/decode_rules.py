"""How the kernels of few tokens divide shapes that no table has: configurations of decode.py, binary.py and spqr.py.

All yield the most promising first; `configs` takes the first that fits. What was measured on an H100, and where the
rules come from, is in benchmarks/results/2026-11-22-h100-kernel-variants.jsonl and of the day after.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, Final, Literal

from pallas_kernels import compat, order
from pallas_kernels.decode_config import DecodeConfig

MULTIPROCESSORS: Final = 132  # of an H100 or H200
WARPGROUPS_UNDER_WAY: Final = 4 * MULTIPROCESSORS
ONE_BLOCK: Final = 226 * 1024  # bytes of shared memory (227 KiB) that one block of a multiprocessor may plan with
TWO_BLOCKS: Final = 112 * 1024
MANY_OF_FEW: Final = 16  # tokens above which a block of decode.py makes 128 outputs, by warpgroups' instruction
FEWEST_BLOCKS: Final = 3 * MULTIPROCESSORS // 4  # below which more blocks are better than more warpgroups in each
DEPTHS: Final = (256, 512, 128)  # of warpgroups, the most promising first; 64 is slow where a deeper one fits
LEAST_DEPTH: Final = 64  # inputs of the shallowest copy
MOST_PARTS: Final = 16
MOST_CLUSTER: Final = 8  # blocks of a portable cluster
OF_WARPS: Final[Any] = {"barriers": "by step", "instruction": "warp"}
DEEP: Final = 512  # inputs of a copy, two of which are under way, where a range has so many of them:
FEWEST_DEEP: Final = 7
NARROW_DEPTHS: Final = (512, 256, 128, 64)  # inputs of a copy: measured, the deepest is the fastest
NARROW_TOKENS: Final = 4  # for which copies of 512 inputs leave enough registers


def by_warps(
    tokens: int, outputs: int, inputs: int, groups: int, rows: int = compat.ROWS_OF_ACCUMULATOR
) -> Iterator[DecodeConfig]:
    """Yields configurations of W4A16 by warps' instruction: one round of blocks where that is possible, deep copies.

    Few outputs: clusters that share the inputs, and two warpgroups a block. Blocks of one warpgroup where there are 1.5
    to 2 of them a multiprocessor. Copies of 512 inputs but where ranges are short or two blocks have no room for them.

    Args:
      tokens: rows of the activations.
      outputs: rows of the weight.
      inputs: columns of the weight.
      groups: rows of the scales.
      rows: outputs of a block.
    """
    columns, tiles = compat.columns_of(tokens, integer=False), outputs // rows
    fill = max(1, min(MOST_CLUSTER, MULTIPROCESSORS // max(1, tiles)))
    counts = (1, 2) if 3 * MULTIPROCESSORS <= 2 * tiles <= 4 * MULTIPROCESSORS else (2, 1)
    parts = [(2**power, count) for power in range(fill.bit_length() - 1, -1, -1) for count in counts]
    deeper = [(*part, depth) for part in parts for depth in (DEEP, 256, 128)]
    for splits, warpgroups, depth in (*deeper, *((*part, LEAST_DEPTH) for part in parts)):
        alone = tiles * splits <= MULTIPROCESSORS
        if alone and depth == DEEP and inputs < FEWEST_DEEP * depth * splits * warpgroups:
            continue
        stages = 4 if alone and depth < DEEP else 2
        grids = rows * 2 * 2 * compat.whole_tiles(depth * groups, inputs)
        needed = warpgroups * stages * (depth * (rows // 2 + 2 * columns) + grids)
        needed += rows * columns * (4 * (warpgroups + splits - 2) + 2)
        if needed <= (ONE_BLOCK if alone else TWO_BLOCKS):
            yield DecodeConfig(depth, stages, warpgroups, splits, rows, cluster=splits > 1, **OF_WARPS)


def of_gate(tokens: int, outputs: int, inputs: int, groups: int) -> list[DecodeConfig]:
    """Returns configurations of products that end with a gate, as `by_warps`.

    Copies of 256 inputs come first where two blocks a multiprocessor are one round, others before: 25.6 us and 27.3 by
    copies of 512 for 16 x 28672 x 4096, but 121.8 and 95.8 for 16 x 57344 x 8192 (H100, 2026-11-23).
    """
    rows = 2 * compat.ROWS_OF_ACCUMULATOR
    first = DEPTHS[0] if outputs // rows <= 2 * MULTIPROCESSORS else DEEP
    return sorted(by_warps(tokens, outputs, inputs, groups, rows), key=lambda each: each.depth != first)


def by_warpgroups(
    tokens: int, outputs: int, inputs: int, groups: int, *, integer: bool, rows: int | None = None
) -> list[DecodeConfig]:
    """Returns configurations of W4A16 and W4A8: four warpgroups a multiprocessor, deep copies.

    For more than 16 tokens all copies of 128 inputs come before those of 64, which took 1.1 to 3.3 times as long.

    Args:
      tokens: rows of the activations.
      outputs: rows of the weight.
      inputs: columns of the weight.
      groups: rows of the scales.
      integer: the activations are int8.
      rows: outputs of a block; None for all of `rows_of`.
    """
    if rows is None:
        same = functools.partial(by_warpgroups, tokens, outputs, inputs, groups, integer=integer)
        found = [each for rows in rows_of(tokens) for each in same(rows=rows)]
        return sorted(found, key=lambda each: tokens > MANY_OF_FEW and each.depth == LEAST_DEPTH)
    width = 1 if integer else 2
    columns = compat.columns_of(tokens, integer=integer)
    tiles = compat.whole_tiles(outputs, rows)
    deep = inputs % 128 == 0 and tokens <= MANY_OF_FEW and fits(inputs // groups, 128)
    wanted = 2 ** max(1, round(math.log2(WARPGROUPS_UNDER_WAY * 64 / rows / tiles)))
    found = []
    for parts in (2**power for power in range(min(wanted, MOST_PARTS).bit_length() - 1, -1, -1)):
        wide, narrow = min(4, parts), max(1, min(4, parts) // 2)
        idle = tiles * parts // wide < FEWEST_BLOCKS
        for warpgroups in (narrow, wide) if idle else (wide, narrow):
            splits = parts // warpgroups
            room = ONE_BLOCK if tiles * splits <= MULTIPROCESSORS else TWO_BLOCKS
            others = warpgroups - 1 + (splits - 1 if splits <= MOST_CLUSTER else 0)
            room -= rows * columns * (4 * others + 2)
            for depth in DEPTHS if deep else (*DEPTHS, LEAST_DEPTH):
                grids = rows * 2 * 2 * compat.whole_tiles(depth * groups, inputs)  # scales, and centers or wider scales
                one = warpgroups * (depth * (rows // 2 + columns * width) + grids)
                stages = min(4, room // one, inputs // (depth * parts))
                if inputs % (depth * parts) == 0 and (stages >= 2 or stages == inputs // (depth * parts) == 1):
                    found.append(DecodeConfig(depth, stages, warpgroups, splits, rows, 1 < splits <= MOST_CLUSTER))
    return list(dict.fromkeys(found))


def rows_of(tokens: int) -> tuple[int, ...]:
    """Returns how many outputs a block of decode.py should make: more where the activations' traffic is felt."""
    return (128, 64) if tokens > MANY_OF_FEW else (64,)


def fits(group: int, depth: int) -> bool:
    """Tells whether copies of a depth hold whole groups, or groups whole copies, in runs of 32 inputs."""
    return group % order.RUN == 0 and (group % depth == 0 or depth % group == 0)


def of_binary(bits: int, tokens: int, outputs: int) -> Iterator[DecodeConfig]:
    """Yields configurations of binary.py: deep copies, four warpgroups.

    With one token, which alone was measured, a kernel makes the pieces, and warps multiply three planes (not four).
    """
    pieces: Literal["by XLA", "by kernel"] = "by kernel" if tokens == 1 else "by XLA"
    instruction: Literal["warpgroup", "warp"] = "warp" if tokens == 1 and bits == 3 else "warpgroup"
    for depth in NARROW_DEPTHS if tokens <= NARROW_TOKENS else NARROW_DEPTHS[1:]:
        for warpgroups, splits in ((count, splits) for count in (4, 2, 1) for splits in _narrow_splits(outputs)):
            stages = 2 if depth == NARROW_DEPTHS[0] else 3
            yield DecodeConfig(
                depth, stages, warpgroups, splits, cluster=splits > 1, instruction=instruction, pieces=pieces
            )


def of_spqr(outputs: int, inputs: int) -> Iterator[DecodeConfig]:
    """Yields configurations of spqr.py: four warpgroups, deep copies where one round of blocks has many of them."""
    long = outputs <= MULTIPROCESSORS * compat.ROWS_OF_ACCUMULATOR
    for warpgroups in (4, 2, 1):
        for splits in _narrow_splits(outputs):
            if long and inputs >= FEWEST_DEEP * DEEP * splits * warpgroups:
                yield DecodeConfig(DEEP, 2, warpgroups, splits, cluster=splits > 1, **OF_WARPS)
            yield DecodeConfig(256, 3, warpgroups, splits, cluster=splits > 1, **OF_WARPS)


def _narrow_splits(outputs: int) -> tuple[int, int]:
    """Returns how many blocks share inputs: two where tiles fill half of the blocks of a round, or need two rounds."""
    tiles = compat.whole_tiles(outputs, compat.ROWS_OF_ACCUMULATOR)
    return (2, 1) if tiles > MULTIPROCESSORS or 2 * tiles <= MULTIPROCESSORS else (1, 2)
