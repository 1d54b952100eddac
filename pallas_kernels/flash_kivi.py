"""Keys coded per channel over some tokens, values per token over some channels (KIVI), 2 or 4 bits.

Codes lie in the upper bits of a bfloat16's mantissa, so that what they are too large by is small: with L = 2^bits,

    (word shifted) & mask | 0x3F803F80    =    1 + code / L,   1 + other code / L

A key's grid multiplies the query, once for a warp's tokens of a step, as they share it; its middle enters the scores by
a product of its own. A value's grid multiplies P, group by group; middles of all groups are rows of one operand. With
c = 1 + (L - 1) / 2 L, what the middle code is,

    S = (K' - c) (L scale q)^T + middle q^T         O_g += (V'_g - c)^T (L scale_g P) + middle_g P

L scale q and L scale_g P are rounded to bfloat16: only what a number differs from its middle is off by that, as c is
taken off by products with the rounded ones. Grids are kept as L scale and middle, in bfloat16 (`kivi_layout`).

Reference: KIVI (arXiv:2402.02750).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from pallas_kernels import flash
from pallas_kernels.flash import GROUP, NEVER, WARPS
from pallas_kernels.lanes import HIGH_HALVES, LOW_HALVES, Lanes, Registers, Value

MANTISSA: Final = 7  # bits of bfloat16's mantissa
BFLOAT16: Final = 2  # bytes


@dataclass(frozen=True)
class KiviWalk:
    """The programs of a warpgroup that walks such a cache.

    Attributes:
      bits: of a code, 2 or 4.
      dim: numbers of a head.
      share: query heads of a KV head.
      tile: tokens of one step, a quarter for each warp.
      key_group: tokens whose keys share a grid, a multiple of a quarter of the tile.
      group: channels whose values share a grid.
    """

    bits: int
    dim: int
    share: int
    tile: int
    key_group: int
    group: int

    @property
    def row(self) -> int:
        """Returns the bytes of one token's head."""
        return self.dim * self.bits // 8

    @property
    def middle(self) -> float:
        """Returns what the middle of all codes is unpacked to."""
        return 1.5 - 2.0 ** -(self.bits + 1)

    @property
    def groups(self) -> int:
        """Returns how many grids a token's values have."""
        return self.dim // self.group

    def begin(self, lanes: Lanes, refs: Sequence[Any], _: Sequence[Registers]) -> list[Registers]:
        """Returns what `flash.begin` does, from the queries [share, dim]."""
        return flash.begin(lanes, refs[0], self.dim, self.share, 16 // self.bits)

    def step(self, lanes: Lanes, refs: Sequence[Any], registers: Sequence[Registers]) -> list[Registers]:
        """Returns the state after one tile of tokens.

        Args:
          lanes: the operations.
          refs: keys and values [tile, row bytes], keys' grids [groups of tokens, 2 dim], values' [16s, 2 groups 16].
          registers: queries, their sums, the state, and how many of the tile's tokens there are, [64, 8].
        """
        queries, _, state, limit = registers
        starts, own = range(0, self.tile // WARPS, GROUP), self.tile // WARPS
        scaled, first = self._scaled(lanes, refs[2], flash.flat(queries))
        middles = self._middles(lanes)
        scores: list[list[Value]] = []
        for start in starts:
            rows, planes, c = flash.token_rows(lanes, start, own), [], first
            for row in rows:
                place = lanes.offset(0, (row, self.row), (lanes.quad, self.row // 4))
                planes.append(self._numbers(lanes, lanes.load(refs[0], place, self.row // 16)))
            upper, lower = planes
            for a in range(0, len(scaled), 2):
                c = lanes.mma([upper[a], lower[a], upper[a + 1], lower[a + 1]], scaled[a : a + 2], c)
            for half, row in enumerate(rows):
                there = lanes.below(row, limit[0][0][0])
                scores.append([lanes.select(there, c[2 * half + i], lanes.number(NEVER)) for i in range(2)])
        weights, _, state = flash.raise_maximum(lanes, scores, state, self.dim)
        outputs, y = [[*tile[0], *tile[1]] for tile in state[: -flash.ENDS]], [*state[-1][0], *state[-1][1]]
        for index, start in enumerate(starts):
            p = [lanes.transpose(lanes.pack(*row)) for row in weights[2 * index : 2 * index + 2]]
            y, outputs = self._add(lanes, refs, start, p, middles, (y, outputs))
        lanes.meet()
        return [[*flash.tiled(flash.flat_numbers(outputs)), state[-3], state[-2], [y[:2], y[2:]]]]

    def finish(self, lanes: Lanes, refs: Sequence[Any], registers: Sequence[Registers]) -> list[Registers]:
        """Returns what `flash.meet` does, from the state and `bytes_to_meet` bytes of shared memory."""
        state = registers[0]
        m, total = state[-2]
        outputs = [[*tile[0], *tile[1]] for tile in state[: -flash.ENDS]]
        return flash.meet(lanes, refs[0], outputs, (m, total, state[-1][0]), self.group // 8)

    def _scaled(self, lanes: Lanes, grids: Any, operands: list[Value]) -> tuple[list[Value], list[Value]]:
        """Returns the queries times the scales of the warp's tokens, and the scores that the middles make."""
        ratio = self.key_group * WARPS // self.tile  # warps that share a grid
        mine = lanes.field(lanes.warp, ratio.bit_length() - 1, 0xFF, 0)
        place = lanes.offset(0, (mine, 2 * BFLOAT16 * self.dim), (lanes.quad, BFLOAT16 * self.dim // 4))
        count = len(operands)
        scales = lanes.load(grids, place, count)
        lows = lanes.load(grids, lanes.offset(BFLOAT16 * self.dim, (place, 1)), count)
        scaled = [lanes.multiply_pairs(q, scale) for q, scale in zip(operands, scales, strict=True)]
        c, off = [lanes.number(0.0)] * 4, [lanes.word(flash.twice(-self.middle))] * 4
        for a in range(0, count, 2):
            c = lanes.mma([lows[a], lows[a], lows[a + 1], lows[a + 1]], operands[a : a + 2], c)
            c = lanes.mma(off, scaled[a : a + 2], c)
        return scaled, c

    def _middles(self, lanes: Lanes) -> list[Value]:
        """Returns for each group an operand's word that is -c, twice, in the row of its number, and 0 elsewhere."""
        nothing, off, found = lanes.word(0), lanes.word(flash.twice(-self.middle)), []
        for group in range(self.groups):
            upto = lanes.select(lanes.below(lanes.row, lanes.word(group + 1)), off, nothing)
            found.append(lanes.select(lanes.below(lanes.row, lanes.word(group)), nothing, upto))
        return found

    def _add(
        self,
        lanes: Lanes,
        refs: Sequence[Any],
        start: int,
        p: list[Value],
        middles: list[Value],
        sums: tuple[list[Value], list[list[Value]]],
    ) -> tuple[list[Value], list[list[Value]]]:
        """Returns sums with 16 more tokens in them: what to add to each group, and the values'."""
        y, outputs = sums
        own, blocks = self.tile // WARPS, start // GROUP
        bytes_of_group = BFLOAT16 * GROUP
        block = ((lanes.warp, 2 * self.groups * bytes_of_group * own // GROUP),)
        at = blocks * 2 * self.groups * bytes_of_group
        weights = []
        for group in range(self.groups):
            places = [
                lanes.offset(at + group * bytes_of_group + 16 * half, *block, (lanes.quad, 4)) for half in range(2)
            ]
            scales = [lanes.load(refs[3], place, 1)[0] for place in places]
            weights.append([lanes.multiply_pairs(one, scale) for one, scale in zip(p, scales, strict=True)])
        mine = lanes.least(lanes.row, self.groups - 1)
        at += self.groups * bytes_of_group
        places = [lanes.offset(at + 16 * half, *block, (mine, bytes_of_group), (lanes.quad, 4)) for half in range(2)]
        lows, zero = [lanes.load(refs[3], place, 1)[0] for place in places], lanes.word(0)
        y = lanes.mma([lows[0], zero, lows[1], zero], p, y)
        for off, weight in zip(middles, weights, strict=True):
            y = lanes.mma([off, zero, off, zero], weight, y)
        pairs = []
        for tokens in flash.token_pairs(lanes, start, own):
            pairs.append(self._values(lanes, refs[1], tokens))
        for tile, output in enumerate(outputs):
            a = [pairs[0][2 * tile], pairs[0][2 * tile + 1], pairs[1][2 * tile], pairs[1][2 * tile + 1]]
            outputs[tile] = lanes.mma(a, weights[2 * tile * 8 // self.group], output)
        return y, outputs

    def _values(self, lanes: Lanes, values: Any, tokens: list[Value]) -> list[Value]:
        """Returns pairs of two tokens' same numbers, in the order in which they are stored."""
        mine = self.row // 8  # bytes of a thread's numbers: two at least
        if mine >= 4:
            places = [lanes.offset(0, (token, self.row), (lanes.row, mine)) for token in tokens]
            words = [lanes.load(values, place, mine // 4) for place in places]
            selectors = [LOW_HALVES, HIGH_HALVES]
        else:  # half a word
            pair, odd = lanes.field(lanes.row, 1, 3, 0), lanes.below(lanes.word(0), lanes.field(lanes.row, 0, 1, 0))
            places = [lanes.offset(0, (token, self.row), (pair, 4)) for token in tokens]
            whole = [lanes.load(values, place, 1)[0] for place in places]
            words = [[lanes.select(odd, lanes.field(word, 16, 0xFFFF, 0), word)] for word in whole]
            selectors = [LOW_HALVES]
        both = [lanes.pick(low, high, each) for low, high in zip(*words, strict=True) for each in selectors]
        return self._numbers(lanes, both)

    def _numbers(self, lanes: Lanes, words: list[Value]) -> list[Value]:
        """Returns pairs 1 + code / L of words, the lowest bits of both halves first."""
        up = MANTISSA - self.bits
        mask = (2**self.bits - 1) << up
        shifts = range(0, 16, self.bits)
        return [lanes.field(word, shift - up, mask << 16 | mask, flash.ONES) for word in words for shift in shifts]
