"""What a step does before it attends, in one kernel: RoPE of queries and keys, codes of keys and values, their writing.

    projected   [queries of all heads | keys | values], numbers [dim] behind one another
    turned      (low cos - high sin, high cos + low sin)      rounded to bfloat16; values as they are
    spread      H turned / sqrt(dim), H Sylvester's           likewise; if wanted
    low         scale = max(max - min, 1e-5) / L,  code = clip(rne((x - min) / scale), 0, L),  L = 2^bits - 1
    zero        scale = (high - low) / L, zero = rne(-low / scale),  code = clip(rne(x / scale) + zero, 0, L),
                low = clip min(x, 0), high = clip max(x, 0)

Scale and min are rounded to float16 before codes are made of them, as `attention` reads them: the bytes are those of
`jquant.kv.vectors`. dim / 16 threads share the numbers of a head, each with 8 of the lower half and the 8 that RoPE
turns with them: whole words to load, whole words of codes to store. Caches are changed where they lie: the rest of them
is neither read nor written.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels import compat
from pallas_kernels.attention import DIMS, PackedCache
from pallas_kernels.flash import flat, tiled
from pallas_kernels.lanes import THREADS, Lanes, Registers, Value
from pallas_kernels.lanes_gpu import run

NUMBERS: Final = 16  # of a head, of one thread
HALF: Final = NUMBERS // 2
LOADED: Final = (64, 2 * (HALF + NUMBERS))  # words: a thread's numbers, 8 cosines, 8 sines
TURNED: Final = (64, 2 * HALF)  # words: a thread's numbers
LEAST_RANGE: Final = 1e-5  # of a low grid, see `jquant.numerics.offset`
LEAST_SCALE: Final = 2.0**-24  # of float16, above 0
EMPTY: Final = 2.0**-126  # times 2^bits: a range that counts as [-1, 1], see `jquant.numerics.rounding`
ROUNDER: Final = 1.5 * 2.0**23  # float32: a small number added to it is rounded, half to even, into its last bits
ROUNDER_BITS: Final = 0x4B400000
UPPER: Final = 0xFFFF0000
FAR: Final = 2.0**21  # quotients from here on have the last code, corrected or not
BYTES_OF_GRIDS: Final = 8  # float16 scale and low of a key, and of a value


class Coding(NamedTuple):
    """How tokens become what is kept.

    Attributes:
      grid: see the module's table; of no meaning where numbers are kept as they are.
      clip: share of the range that a "zero" grid keeps.
      spread: "hadamard" turns each head of queries and keys by Sylvester's matrix, after RoPE.
    """

    grid: Literal["low", "zero"] = "low"
    clip: float = 1.0
    spread: Literal["no", "hadamard"] = "no"


def append_token(
    projected: BFloat16[Array, "rows numbers"],
    angles: Float32[Array, "rows dim"],
    positions: Int32[Array, "rows"],
    cache: PackedCache,
    *,
    coding: Coding,
    simulate: compat.Simulation | None = None,
) -> tuple[BFloat16[Array, "rows heads dim"], PackedCache]:
    """Turns, codes and writes one token of each row.

    Args:
      projected: queries, keys and values before RoPE; neighbouring query heads share a KV head.
      angles: cosines, then sines, of the pairs (i, i + dim / 2).
      positions: where each row's token goes; one past the end is not kept.
      cache: page b is row b.
      coding: how a token is coded.
      simulate: run in the interpreter on the CPU with these settings.

    Returns:
      The queries after RoPE, and the cache with the tokens in it.

    Raises:
      ValueError: there is no kernel for these shapes.
    """
    rows, kv_heads, slots, stored = cache.keys.shape
    dim, numbers = angles.shape[1], projected.shape[1]
    if dim not in DIMS or numbers % dim or numbers < 3 * kv_heads * dim:
        raise ValueError(f"{numbers} numbers for {kv_heads} KV heads of {dim}: kernels take whole heads of {DIMS}")
    heads = numbers // dim - 2 * kv_heads
    program = Append(heads, kv_heads, dim, slots, 16 if cache.grids is None else stored * 8 // dim, coding)
    body = functools.partial(_body, program, simulated=simulate is not None)
    call = compat.kernel(
        body,
        out=jax.ShapeDtypeStruct((rows, heads, dim), jnp.bfloat16),
        scratch={},
        grid={"row": rows} | ({} if simulate else {"part": program.parts}),
        manual_barriers=True,
        simulate=simulate,
    )
    kept = [jax.new_ref(leaf) for leaf in cache if leaf is not None]
    queries = call(projected, angles, positions, *kept)
    keys, values, *grids = (ref[...] for ref in kept)
    return queries, PackedCache(keys, values, grids[0] if grids else None)


def _body(program: "Append", *refs: Any, simulated: bool) -> None:
    projected, angles, positions, *caches, out = refs
    row = lax.axis_index("row")
    place = compat.cast(jnp.full((64, 8), positions[row], jnp.int32), compat.C)
    given = [out.at[row], *(each.at[row] for each in caches), projected.at[row], angles.at[row]]
    for index in range(program.parts) if simulated else [lax.axis_index("part")]:
        part = compat.cast(jnp.full((64, 8), index, jnp.int32), compat.C)
        run(program, given, [place, part], (), 1 + len(caches), simulated=simulated)


@dataclass(frozen=True)
class Append:
    """The program of a warpgroup that has 2048 / dim heads of one row.

    Attributes:
      heads: query heads, of all KV heads or of the one that is `alone`.
      kv_heads: likewise, all or 1.
      dim: numbers of a head.
      slots: of the caches that it is given, from 0 on.
      bits: of a code; 16 for bfloat16.
      coding: how a token is coded.
      alone: KV heads of a row, where a warpgroup has one of them, what it stores for the block's others to see and for
        copies; 0 where it has all.
    """

    heads: int
    kv_heads: int
    dim: int
    slots: int
    bits: int
    coding: Coding
    alone: int = 0

    @property
    def threads(self) -> int:
        """Returns how many threads share a head's numbers."""
        return self.dim // NUMBERS

    @property
    def parts(self) -> int:
        """Returns how many warpgroups a row takes."""
        return -(-(self.heads + 2 * self.kv_heads) * self.threads // THREADS)

    def __call__(self, lanes: Lanes, refs: Sequence[Any], registers: Sequence[Registers]) -> list[Registers]:
        """Stores queries, keys, values and grids, from the position and the part, [64, 8]."""
        out, *caches, projected, angles = refs
        position, part = registers
        (words,) = self.load(lanes, [projected, angles], [part])
        (words,) = self.turn(lanes, [out], [words, part])
        return self.keep(lanes, caches, [words, position, part])

    def load(self, lanes: Lanes, refs: Sequence[Any], registers: Sequence[Registers]) -> list[Registers]:
        """Returns a thread's words, `LOADED`, of a row's numbers and angles, from the part, or KV head, [64, 8]."""
        (projected, angles), part = refs, registers[0][0][0][0]
        member, head = self._thread(lanes, part)
        own = self._place(lanes, lanes.least(head, self.heads + 2 * self.kv_heads - 1), part)
        place = lanes.offset(0, (own, 2 * self.dim), (member, 2 * HALF))
        words = [
            each for start in (0, self.dim) for each in lanes.load(projected, _after(lanes, start, place), HALF // 2)
        ]
        place = lanes.offset(0, (member, 4 * HALF))
        words += [each for start in (0, 2 * self.dim) for each in lanes.load(angles, _after(lanes, start, place), HALF)]
        return [tiled(words)]

    def turn(self, lanes: Lanes, refs: Sequence[Any], registers: Sequence[Registers]) -> list[Registers]:
        """Stores queries, and returns a thread's words after RoPE, `TURNED`, from what it loaded and the part."""
        loaded, part = flat(registers[0]), registers[1][0][0][0]
        member, head = self._thread(lanes, part)
        pairs = self._turned(lanes, loaded, member, head)
        words = [lanes.pack(*pairs[i : i + 2]) for i in range(0, NUMBERS, 2)]
        target = lanes.offset(0, (head, 2 * self.dim), (member, 2 * HALF))
        self._store(lanes, refs[0], target, self.dim, words, lanes.below(head, lanes.word(self.heads)))
        return [tiled(words)]

    def keep(self, lanes: Lanes, refs: Sequence[Any], registers: Sequence[Registers]) -> list[Registers]:
        """Stores keys, values and grids in the caches, from words after RoPE, the position and the part."""
        words, (position, part) = flat(registers[0]), (each[0][0][0] for each in registers[1:])
        member, head = self._thread(lanes, part)
        if self.bits != 16:
            numbers = [number for word in words for number in _numbers(lanes, word)]
            words, grid = self._coded(lanes, numbers)
        room = lanes.below(position, lanes.word(self.slots))
        for index, cache in enumerate(refs[:2]):
            own = lanes.offset(-self.heads - index * self.kv_heads, (head, 1))
            mine = self._kept(lanes, own, room)
            token = lanes.offset(0, (own, self.slots), (position, 1))
            place = lanes.offset(0, (token, self.dim * self.bits // 8), (member, HALF * self.bits // 8))
            self._store(lanes, cache, place, self.dim * self.bits // 16, words, mine)
            if self.bits != 16:
                first = lanes.select(lanes.below(lanes.word(0), member), lanes.word(self.kv_heads), own)
                place = lanes.offset(4 * index, (token, BYTES_OF_GRIDS))
                lanes.store_word(refs[2], place, grid, self._kept(lanes, first, room))
        if self.alone:
            lanes.publish()
        return []

    def _thread(self, lanes: Lanes, part: Value) -> tuple[Value, Value]:
        """Returns which of a head's threads this one is, and of which head."""
        thread = lanes.offset(0, (lanes.warp, 32), (lanes.row, 4), (lanes.quad, 1))
        shift = self.threads.bit_length() - 1
        member, head = (lanes.field(thread, *each, 0) for each in ((0, self.threads - 1), (shift, THREADS - 1)))
        return member, head if self.alone else lanes.offset(0, (part, THREADS // self.threads), (head, 1))

    def _place(self, lanes: Lanes, head: Value, part: Value) -> Value:
        """Returns the place among a row's heads of one of this program's."""
        if not self.alone:
            return head
        query = lanes.offset(0, (part, self.heads), (head, 1))
        return lanes.select(
            lanes.below(head, lanes.word(self.heads)), query, lanes.offset(0, (head, self.alone), (part, 1))
        )

    def _kept(self, lanes: Lanes, head: Value, room: Value) -> Value:
        """Tells whether a head is one of the cache's, and there is room for its token."""
        none = lanes.word(self.kv_heads)
        head = lanes.select(lanes.below(head, lanes.word(0)), none, head)
        return lanes.below(lanes.select(room, head, none), none)

    def _turned(self, lanes: Lanes, loaded: list[Value], member: Value, head: Value) -> list[Value]:
        """Returns a thread's 16 numbers, those of queries and keys turned: 8 of the lower half, 8 of the upper."""
        words, cosines, sines = loaded[:HALF], loaded[HALF:NUMBERS], loaded[NUMBERS:]
        numbers = [number for word in words for number in _numbers(lanes, word)]
        halves = numbers[:HALF], numbers[HALF:]
        straight = lanes.below(lanes.word(self.heads + self.kv_heads - 1), head)
        low, high = [], []
        for a, b, cosine, sine in zip(*halves, cosines, sines, strict=True):
            cos = lanes.select(straight, lanes.number(1.0), lanes.floats(cosine))
            sin = lanes.select(straight, lanes.number(0.0), lanes.floats(sine))
            low.append(lanes.subtract(lanes.multiply(a, cos), lanes.multiply(b, sin)))
            high.append(lanes.add(lanes.multiply(b, cos), lanes.multiply(a, sin)))
        turned = low + high
        return turned if self.coding.spread == "no" else self._spread(lanes, turned, member, straight)

    def _spread(self, lanes: Lanes, numbers: list[Value], member: Value, straight: Value) -> list[Value]:
        """Returns the numbers times Sylvester's matrix, but for values."""
        words = [lanes.pack(*numbers[i : i + 2]) for i in range(0, NUMBERS, 2)]
        kept = [number for word in words for number in _numbers(lanes, word)]
        found = kept
        for apart in (1, 2, 4, 8):
            sums = [lanes.add(found[i & ~apart], found[i | apart]) for i in range(NUMBERS)]
            differences = [lanes.subtract(found[i & ~apart], found[i | apart]) for i in range(NUMBERS)]
            found = [differences[i] if i & apart else sums[i] for i in range(NUMBERS)]
        for step in range(int(math.log2(self.threads))):
            first = lanes.below(lanes.field(member, step, 1, 0), lanes.word(1))
            for i, number in enumerate(found):
                own = lanes.select(first, number, lanes.subtract(lanes.number(0.0), number))
                found[i] = lanes.add(own, lanes.shuffle(number, 1 << step))
        scale = lanes.number(self.dim**-0.5)
        return [lanes.select(straight, old, lanes.multiply(new, scale)) for old, new in zip(kept, found, strict=True)]

    def _coded(self, lanes: Lanes, numbers: list[Value]) -> tuple[list[Value], Value]:
        """Returns words of codes, and the word of scale and low end."""
        zero, most = lanes.number(0.0), float(2**self.bits - 1)
        high, below = numbers[0], lanes.subtract(zero, numbers[0])
        for number in numbers[1:]:
            high, below = lanes.larger(high, number), lanes.larger(below, lanes.subtract(zero, number))
        for step in range(int(math.log2(self.threads))):
            high = lanes.larger(high, lanes.shuffle(high, 1 << step))
            below = lanes.larger(below, lanes.shuffle(below, 1 << step))
        if self.coding.grid == "low":
            reach = lanes.larger(lanes.add(high, below), lanes.number(LEAST_RANGE))
            scale = quotient(lanes, reach, lanes.number(most), lanes.number(1 / most))
            grid = lanes.pack_halves(scale, lanes.subtract(zero, below))
        else:
            clip = lanes.number(self.coding.clip)
            high, below = (lanes.multiply(clip, lanes.larger(end, zero)) for end in (high, below))
            empty = lanes.less(lanes.larger(high, below), lanes.number(2**self.bits * EMPTY))
            high, below = (lanes.select(empty, lanes.number(1.0), end) for end in (high, below))
            exact = lanes.divide(lanes.add(high, below), lanes.number(most))
            middle = self._whole(lanes, lanes.divide(below, exact))
            grid = lanes.pack_halves(lanes.larger(exact, lanes.number(LEAST_SCALE)), middle)
        scale, other = lanes.halves(grid)
        inverse = lanes.reciprocal(scale)
        per_word, words = 32 // self.bits, []
        for start in range(0, NUMBERS, per_word):
            word = lanes.word(0)
            for i, number in enumerate(numbers[start : start + per_word]):
                if self.coding.grid == "low":
                    level = quotient(lanes, lanes.subtract(number, other), scale, inverse)
                else:
                    level = lanes.add(self._whole(lanes, quotient(lanes, number, scale, inverse)), other)
                rounded = lanes.bits(lanes.add(lanes.larger(level, zero), lanes.number(ROUNDER)))
                code = lanes.least(lanes.offset(-ROUNDER_BITS, (rounded, 1)), int(most))
                word = lanes.xor(word, lanes.field(code, -self.bits * i, int(most) << self.bits * i, 0))
            words.append(word)
        return words, grid

    def _whole(self, lanes: Lanes, number: Value) -> Value:
        """Returns a number below 2^22 rounded to a whole one, half to even."""
        rounder = lanes.number(ROUNDER)
        return lanes.subtract(lanes.add(number, rounder), rounder)

    def _store(self, lanes: Lanes, ref: Any, place: Value, apart: int, words: list[Value], condition: Value) -> None:
        """Stores a thread's words, the upper half's so many bytes behind the lower's."""
        for index, word in enumerate(words):
            half, inside = divmod(index, len(words) // 2)
            lanes.store_word(ref, lanes.offset(half * apart + 4 * inside, (place, 1)), word, condition)


def quotient(lanes: Lanes, a: Value, b: Value, inverse: Value) -> Value:
    """Returns a / b rounded to nearest, without a branch; from `FAR` on, and where it is tiny, nearly.

    b has at most 11 significant bits, as a float16 has. a / b is then 2^-12 units in the last place from what lies
    between two float32, or there itself; a product with the inverse is 3 units off at most, its remainder exact, and
    corrected by that, before it is rounded, 3 * 2^-22 units.

    Args:
      lanes: the operations.
      a: float32.
      b: float32, of a float16's values above 0.
      inverse: 1 / b, to a unit in the last place.
    """
    near = lanes.multiply(a, inverse)
    rest = lanes.fma(lanes.subtract(lanes.number(0.0), near), b, a)
    return lanes.select(lanes.less(near, lanes.number(FAR)), lanes.fma(rest, inverse, near), near)


def _after(lanes: Lanes, start: int, place: Value) -> Value:
    """Returns a place so many bytes behind another."""
    return lanes.offset(start, (place, 1))


def _numbers(lanes: Lanes, word: Value) -> tuple[Value, Value]:
    """Returns the two bfloat16 of a word as float32."""
    return lanes.floats(lanes.field(word, -16, UPPER, 0)), lanes.floats(lanes.field(word, 0, UPPER, 0))
