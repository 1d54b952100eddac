"""Keys and values that are coded token by token, each with a grid of its own: 4 or 8 bits, or bfloat16 as it is.

A word of eight 4-bit codes is four operands of two codes, without a conversion,

    (word >> 4 i) & 0x000F000F | 0x43004300    =    128 + code i, 128 + code i + 4     as bfloat16

and sums of queries and of P, which the tensor cores make too, take the 128 out again. 8-bit codes are two planes of 4
bits, the upper times 16 (in S as it is, in O^T by 16 P). Each token's scale and low multiply S, and P:

    s = scale_k (K Q^T)[t] + low_k sum(q)        o = sum_t (p_t scale_v) (code[t] - c) + sum_t p_t (low_v + c scale_v)

p_t scale_v is rounded to bfloat16, p_t (..) is not; c, the middle code, leaves of the rounding what a number differs
from the middle of its grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from pallas_kernels import flash
from pallas_kernels.flash import GROUP, NEVER, WARPS
from pallas_kernels.lanes import HIGH_HALVES, LOW_HALVES, Lanes, Registers, Value

type Grid = Literal["low", "zero", "none"]  # what lies beside a scale: a number, a code, or nothing at all

BIAS: Final = 128.0  # of a code beside the bits of 128 in bfloat16
BIAS_BITS: Final = 0x43004300
NIBBLES: Final = 0x000F000F
UPPER: Final = 16.0  # what the upper four of eight bits count
BYTES_OF_GRIDS: Final = 8  # float16 scale and low of a key, and of a value


@dataclass(frozen=True)
class TokenWalk:
    """The programs of a warpgroup that walks such a cache.

    Attributes:
      bits: of a code, 4 or 8; 16 for bfloat16 itself.
      dim: numbers of a head.
      share: query heads of a KV head.
      tile: tokens of one step, a quarter for each warp.
      grid: "low" for scale * code + low, "zero" for scale * (code - zero), "none" for bfloat16.
      group: by which the values' numbers are ordered, see `flash`; `dim` leaves them as they are.
    """

    bits: int
    dim: int
    share: int
    tile: int
    grid: Grid
    group: int

    @property
    def row(self) -> int:
        """Returns the bytes of one token's head."""
        return self.dim * self.bits // 8

    @property
    def bias(self) -> float:
        """Returns what unpacked codes are too large by."""
        return {4: BIAS, 8: BIAS * (1 + UPPER), 16: 0.0}[self.bits]

    @property
    def middle(self) -> float:
        """Returns a code in the middle that bfloat16 has exactly, and the sum with the bias too."""
        return 0.0 if self.bits == 16 else 2.0 ** (self.bits - 1)

    def begin(self, lanes: Lanes, refs: Sequence[Any], _: Sequence[Registers]) -> list[Registers]:
        """Returns what `flash.begin` does, from the queries [share, dim]."""
        return flash.begin(lanes, refs[0], self.dim, self.share, 16 // self.bits)

    def step(self, lanes: Lanes, refs: Sequence[Any], registers: Sequence[Registers]) -> list[Registers]:
        """Returns the state after one tile of tokens.

        Args:
          lanes: the operations.
          refs: keys and values [tile, row bytes], and but for bfloat16 the grids [tile, 4].
          registers: queries, their sums, the state, and how many of the tile's tokens there are, [64, 8].
        """
        queries, sums, state, limit = registers
        starts = range(0, self.tile // WARPS, GROUP)
        scores: list[list[Value]] = []
        grids: list[Value] = []
        for start in starts:
            found, of_values = self._scores(lanes, refs, start, flash.flat(queries), sums[0][0], limit[0][0][0])
            scores += found
            grids += of_values
        weights, _, state = flash.raise_maximum(lanes, scores, state, self.dim)
        outputs = [[*tile[0], *tile[1]] for tile in state[: -flash.ENDS]]
        z, (y, unused) = [*state[-3][0], *state[-3][1]], state[-1]
        for index, start in enumerate(starts):
            p = weights[2 * index : 2 * index + 2]
            for row in range(2 if grids else 0):
                value, low = self._grid(lanes, grids[2 * index + row], self.middle)
                y = [lanes.fma(p[row][i], low, y[i]) for i in range(2)]
                p[row] = [lanes.multiply(p[row][i], value) for i in range(2)]
            z, outputs = self._add(lanes, refs[1], start, p, z, outputs)
        lanes.meet()
        return [[*flash.tiled(flash.flat_numbers(outputs)), [z[:2], z[2:]], state[-2], [y, unused]]]

    def finish(self, lanes: Lanes, refs: Sequence[Any], registers: Sequence[Registers]) -> list[Registers]:
        """Returns what `flash.meet` does, from the state and `bytes_to_meet` bytes of shared memory."""
        state = registers[0]
        (m, total), (y, _), z = state[-2], state[-1], state[-3][0]
        lows = [lanes.subtract(flash.total_of_quads(lanes, y[i]), z[i]) for i in range(2)]
        outputs = [[*tile[0], *tile[1]] for tile in state[: -flash.ENDS]]
        return flash.meet(lanes, refs[0], outputs, (m, total, lows), self.dim // 8)

    def _scores(
        self, lanes: Lanes, refs: Sequence[Any], start: int, operands: list[Value], sums: list[Value], limit: Value
    ) -> tuple[list[list[Value]], list[Value]]:
        """Returns the scores of 16 tokens by (row, head), and the grids of the rows' values."""
        rows = flash.token_rows(lanes, start, self.tile // WARPS)
        planes = []
        for row in rows:
            place = lanes.offset(0, (row, self.row), (lanes.quad, self.row // 4))
            planes.append(_unpack_keys(lanes, lanes.load(refs[0], place, self.row // 16), self.bits))
        first = [lanes.multiply(lanes.number(-self.bias), each) for each in sums] if self.bias else None
        found: list[Value] = []
        for plane, (upper, lower) in enumerate(zip(*planes, strict=True)):
            c = [first[i % 2] for i in range(4)] if first and plane == 0 else [lanes.number(0.0)] * 4
            for a in range(0, len(operands), 2):
                c = lanes.mma([upper[a], lower[a], upper[a + 1], lower[a + 1]], operands[a : a + 2], c)
            found = [lanes.fma(lanes.number(UPPER), c[i], found[i]) for i in range(4)] if plane else c
        scores, of_values = [found[:2], found[2:]], []
        for half, row in enumerate(rows):
            if self.grid != "none":
                words = lanes.load(refs[2], lanes.offset(0, (row, BYTES_OF_GRIDS)), 2)
                key, low = self._grid(lanes, words[0])
                scores[half] = [lanes.fma(key, scores[half][i], lanes.multiply(low, sums[i])) for i in range(2)]
                of_values.append(words[1])
            there, never = lanes.below(row, limit), lanes.number(NEVER)
            scores[half] = [lanes.select(there, scores[half][i], never) for i in range(2)]
        return scores, of_values

    def _grid(self, lanes: Lanes, word: Value, code: float = 0.0) -> tuple[Value, Value]:
        """Returns a grid's scale and what a code stands for."""
        scale, other = lanes.halves(word)
        if self.grid == "low":
            return scale, lanes.fma(scale, lanes.number(code), other) if code else other
        return scale, lanes.multiply(scale, lanes.subtract(lanes.number(code), other))

    def _add(
        self, lanes: Lanes, values: Any, start: int, p: list[list[Value]], z: list[Value], outputs: list[list[Value]]
    ) -> tuple[list[Value], list[list[Value]]]:
        """Returns the sums with 16 more tokens' values, and those of the bias."""
        weights = []
        for factor in (1.0, UPPER) if self.bits == 8 else (1.0,):
            scaled = [[lanes.multiply(one, lanes.number(factor)) for one in row] for row in p] if factor != 1.0 else p
            weights.append([lanes.transpose(lanes.pack(*row)) for row in scaled])
        if self.bias:
            z = lanes.mma([lanes.word(flash.twice(self.bias + self.middle))] * 4, weights[0], z)
        pairs = []
        for tokens in flash.token_pairs(lanes, start, self.tile // WARPS):
            places = [lanes.offset(0, (token, self.row), (lanes.row, self.row // 8)) for token in tokens]
            words = [lanes.load(values, place, self.row // 32) for place in places]
            pairs.append(_unpack_values(lanes, words, self.bits))
        for plane, weight in enumerate(weights):
            first, second = pairs[0][plane], pairs[1][plane]
            for tile in range(self.dim // GROUP):
                a = [first[2 * tile], first[2 * tile + 1], second[2 * tile], second[2 * tile + 1]]
                outputs[tile] = lanes.mma(a, weight, outputs[tile])
        return z, outputs


def _unpack_keys(lanes: Lanes, words: list[Value], bits: int) -> list[list[Value]]:
    """Returns pairs of one key's numbers, plane by plane; a pair's are half a word's numbers apart."""
    if bits == 16:
        return [words]
    shifts = ((0, 4, 8, 12),) if bits == 4 else ((0, 8), (4, 12))
    return [[lanes.field(word, shift, NIBBLES, BIAS_BITS) for word in words for shift in plane] for plane in shifts]


def _unpack_values(lanes: Lanes, words: list[list[Value]], bits: int) -> list[list[Value]]:
    """Returns pairs of two tokens' same numbers, plane by plane, in the order of the numbers."""
    shifts = {4: ((0, 4, 8, 12),), 8: ((0, 8), (4, 12)), 16: ((0,),)}[bits]
    planes: list[list[Value]] = [[] for _ in shifts]
    for first, second in zip(*words, strict=True):
        for selector in (LOW_HALVES, HIGH_HALVES):
            both = lanes.pick(first, second, selector)
            for plane, some in zip(planes, shifts, strict=True):
                plane += [both if bits == 16 else lanes.field(both, shift, NIBBLES, BIAS_BITS) for shift in some]
    return planes
