"""What a thread of a warp does, operation by operation: written once, run by a GPU's threads or all at once by numpy.

A kernel whose operands lie in registers as `mma.sync` wants them is written against `Lanes`. On the GPU (`lanes_gpu`)
each operation is an instruction. In the interpreter it acts on arrays [threads] of a whole warpgroup, so that a test on
a CPU sees which thread holds which number, and not only what the sum of all of them should be.

Lane l of a warp has `row` l / 4 and `quad` l % 4. Operands of mma.sync m16n8k16, D = A B + C, as PTX defines them:

    A [16, 16]  four words of two bfloat16: rows row, row + 8, row, row + 8; columns 2 quad + 0..1, the last two + 8
    B [16, 8]   two words: column row, rows 2 quad + 0..1 (+ 8)
    C [16, 8]   four float32: row, columns 2 quad + 0..1; row + 8, the same columns

An array [64, columns] in the layout `compat.C` is, warp by warp, tiles [16, 8] in the layout of C here: the way in
which registers go from one call to the next. `Registers` are its numbers by (column tile, half of the rows, column).

Reference: PTX ISA 8.x, "Warp-level matrix instructions", and `movmatrix`.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any, Final, final

import jax
import jax.numpy as jnp
import numpy as np

THREADS: Final = 128  # of a warpgroup
LOW_HALVES: Final = 0x5410  # selectors of `Lanes.pick`: the low halves of two words, the first lowest
HIGH_HALVES: Final = 0x7632

type Value = Any  # a register of a thread: a word of 32 bits, a float32 or a condition
type Registers = list[list[list[Value]]]  # [column tile][half][column of the pair]


class Lanes(abc.ABC):
    """The operations; words are 32 bits without a sign unless said otherwise."""

    warp: Value
    row: Value
    quad: Value

    @abc.abstractmethod
    def word(self, value: int) -> Value:
        """Returns a constant."""

    @abc.abstractmethod
    def number(self, value: float) -> Value:
        """Returns a float32 constant."""

    @abc.abstractmethod
    def offset(self, start: int, *terms: tuple[Value, int]) -> Value:
        """Returns start + sum of word * factor."""

    @abc.abstractmethod
    def xor(self, a: Value, b: Value) -> Value:
        """Returns the exclusive or of two words."""

    @abc.abstractmethod
    def least(self, a: Value, bound: int) -> Value:
        """Returns the lesser of a word and a constant."""

    @abc.abstractmethod
    def field(self, word: Value, shift: int, mask: int, bias: int) -> Value:
        """Returns (word >> shift) & mask | bias; to the left by a negative shift."""

    @abc.abstractmethod
    def pick(self, low: Value, high: Value, selector: int) -> Value:
        """Returns four bytes of two words: digit i of the selector tells which of the eight is byte i."""

    @abc.abstractmethod
    def load(self, ref: Any, offset: Value, count: int) -> list[Value]:
        """Returns 1, 2 or 4 words, or whole fours, at a byte of a reference."""

    @abc.abstractmethod
    def store(self, ref: Any, offset: Value, value: Value) -> None:
        """Stores a float32 in shared memory."""

    @abc.abstractmethod
    def store_word(self, ref: Any, offset: Value, word: Value, condition: Value) -> None:
        """Stores a word where a condition holds."""

    @abc.abstractmethod
    def reciprocal(self, a: Value) -> Value:
        """Returns 1 / a, to a unit in the last place."""

    @abc.abstractmethod
    def divide(self, a: Value, b: Value) -> Value:
        """Returns a / b, rounded to nearest."""

    @abc.abstractmethod
    def halves(self, word: Value) -> tuple[Value, Value]:
        """Returns the two float16 of a word, the lower first, as float32."""

    @abc.abstractmethod
    def pack_halves(self, low: Value, high: Value) -> Value:
        """Returns the word of two float32 rounded to float16."""

    @abc.abstractmethod
    def bits(self, a: Value) -> Value:
        """Returns the bits of a float32 as a word."""

    @abc.abstractmethod
    def floats(self, word: Value) -> Value:
        """Returns a word's bits as a float32."""

    @abc.abstractmethod
    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """Returns a * b + c, rounded once."""

    @abc.abstractmethod
    def multiply(self, a: Value, b: Value) -> Value:
        """Returns a * b."""

    @abc.abstractmethod
    def add(self, a: Value, b: Value) -> Value:
        """Returns a + b."""

    @abc.abstractmethod
    def subtract(self, a: Value, b: Value) -> Value:
        """Returns a - b."""

    @abc.abstractmethod
    def larger(self, a: Value, b: Value) -> Value:
        """Returns the larger of two float32."""

    @abc.abstractmethod
    def exp2(self, a: Value) -> Value:
        """Returns 2^a, to two units in the last place."""

    @abc.abstractmethod
    def below(self, a: Value, b: Value) -> Value:
        """Tells whether one signed word is less than another."""

    @abc.abstractmethod
    def less(self, a: Value, b: Value) -> Value:
        """Tells whether one float32 is less than another."""

    @abc.abstractmethod
    def select(self, condition: Value, yes: Value, no: Value) -> Value:
        """Returns one of two numbers."""

    @abc.abstractmethod
    def pack(self, low: Value, high: Value) -> Value:
        """Returns the word of two float32 rounded to bfloat16."""

    @abc.abstractmethod
    def multiply_pairs(self, a: Value, b: Value) -> Value:
        """Returns the word of two products of bfloat16, each rounded to bfloat16."""

    @abc.abstractmethod
    def transpose(self, word: Value) -> Value:
        """Returns the word of the transposed matrix [8, 8] whose row `row` has the columns 2 quad + 0..1 here."""

    @abc.abstractmethod
    def mma(self, a: Sequence[Value], b: Sequence[Value], c: Sequence[Value]) -> list[Value]:
        """Returns A B + C of bfloat16, sums in float32."""

    @abc.abstractmethod
    def shuffle(self, value: Value, distance: int) -> Value:
        """Returns the value of the lane whose number differs by the bits of `distance`."""

    @abc.abstractmethod
    def meet(self) -> None:
        """Waits for all threads of the warpgroup: what they have loaded may be overwritten."""

    @abc.abstractmethod
    def publish(self) -> None:
        """Lets copies see what this thread stored in the GPU's memory, that begin behind a barrier of the block."""

    @abc.abstractmethod
    def barrier(self) -> None:
        """Waits for all threads of the warpgroup and what they stored in shared memory."""


@final
class SimulatedLanes(Lanes):
    """All threads of a warpgroup in numpy; a value is an array [128]."""

    def __init__(self) -> None:
        """Numbers the threads."""
        thread = np.arange(THREADS, dtype=np.int64)
        self.warp, self.row, self.quad = thread // 32, thread % 32 // 4, thread % 4

    def word(self, value: int) -> Value:
        """Returns a constant."""
        return np.full(THREADS, value, np.int64)

    def number(self, value: float) -> Value:
        """Returns a float32 constant."""
        return np.full(THREADS, value, np.float32)

    def offset(self, start: int, *terms: tuple[Value, int]) -> Value:
        """Returns start + sum of word * factor."""
        return start + sum(value * factor for value, factor in terms)

    def xor(self, a: Value, b: Value) -> Value:
        """Returns the exclusive or of two words."""
        return a ^ b

    def least(self, a: Value, bound: int) -> Value:
        """Returns the lesser of a word and a constant."""
        return np.minimum(a, bound)

    def field(self, word: Value, shift: int, mask: int, bias: int) -> Value:
        """Returns (word >> shift) & mask | bias."""
        moved = word >> shift if shift >= 0 else word << -shift
        return moved & mask | bias

    def pick(self, low: Value, high: Value, selector: int) -> Value:
        """Returns four bytes of two words."""
        both = low | high << 32
        found = [(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4)]
        return found[0] | found[1] | found[2] | found[3]

    def load(self, ref: Any, offset: Value, count: int) -> list[Value]:
        """Returns words at a byte of an array."""
        if (offset % (4 * min(count, 4))).any():
            raise ValueError(f"a load of {count} words at {offset}: not aligned")
        words = ref.reshape(-1).view(np.uint32)
        return [words[offset // 4 + i].astype(np.int64) for i in range(count)]

    def store(self, ref: Any, offset: Value, value: Value) -> None:
        """Stores a float32."""
        ref.reshape(-1).view(np.float32)[offset // 4] = value

    def store_word(self, ref: Any, offset: Value, word: Value, condition: Value) -> None:
        """Stores a word where a condition holds."""
        ref.reshape(-1).view(np.uint32)[offset[condition] // 4] = word[condition]

    def reciprocal(self, a: Value) -> Value:
        """Returns 1 / a."""
        return np.float32(1) / a

    def divide(self, a: Value, b: Value) -> Value:
        """Returns a / b."""
        return a / b

    def pack_halves(self, low: Value, high: Value) -> Value:
        """Returns the word of two float32 rounded to float16."""
        words = [value.astype(np.float16).view(np.uint16).astype(np.int64) for value in (low, high)]
        return words[0] | words[1] << 16

    def bits(self, a: Value) -> Value:
        """Returns the bits of a float32."""
        return a.astype(np.float32).view(np.uint32).astype(np.int64)

    def halves(self, word: Value) -> tuple[Value, Value]:
        """Returns the two float16 of a word."""
        both = word.astype(np.uint32)[:, None].view(np.float16).astype(np.float32)
        return both[:, 0], both[:, 1]

    def floats(self, word: Value) -> Value:
        """Returns a word's bits as a float32."""
        return word.astype(np.uint32).view(np.float32)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """Returns a * b + c, rounded once."""
        return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)

    def multiply(self, a: Value, b: Value) -> Value:
        """Returns a * b."""
        return a * b

    def add(self, a: Value, b: Value) -> Value:
        """Returns a + b."""
        return a + b

    def subtract(self, a: Value, b: Value) -> Value:
        """Returns a - b."""
        return a - b

    def larger(self, a: Value, b: Value) -> Value:
        """Returns the larger of two float32."""
        return np.maximum(a, b)

    def exp2(self, a: Value) -> Value:
        """Returns 2^a; numbers below the normal ones are 0, as on the GPU."""
        return np.where(a < -126.0, np.float32(0), np.exp2(np.maximum(a, np.float32(-126))))

    def below(self, a: Value, b: Value) -> Value:
        """Tells whether one word is less than another."""
        return a < b

    def less(self, a: Value, b: Value) -> Value:
        """Tells whether one float32 is less than another."""
        return a < b

    def select(self, condition: Value, yes: Value, no: Value) -> Value:
        """Returns one of two numbers."""
        return np.where(condition, yes, no)

    def pack(self, low: Value, high: Value) -> Value:
        """Returns the word of two float32 rounded to bfloat16."""
        words = [value.astype(jnp.bfloat16).view(np.uint16).astype(np.int64) for value in (low, high)]
        return words[0] | words[1] << 16

    def multiply_pairs(self, a: Value, b: Value) -> Value:
        """Returns the word of two products of bfloat16."""
        products = _bfloats(a) * _bfloats(b)
        return self.pack(products[:, 0], products[:, 1])

    def transpose(self, word: Value) -> Value:
        """Returns the word of the transposed matrix."""
        halves = np.stack([word & 0xFFFF, word >> 16], axis=-1).reshape(-1, 8, 8).swapaxes(1, 2).reshape(-1, 2)
        return halves[:, 0] | halves[:, 1] << 16

    def mma(self, a: Sequence[Value], b: Sequence[Value], c: Sequence[Value]) -> list[Value]:
        """Returns A B + C."""
        quarters = [_bfloats(word).reshape(-1, 8, 8) for word in a]
        left = np.concatenate([np.concatenate(quarters[i::2], axis=2) for i in range(2)], axis=1)
        right = np.concatenate([_bfloats(word).reshape(-1, 8, 8).swapaxes(1, 2) for word in b], axis=1)
        product = (left @ right).reshape(-1, 2, 8, 4, 2)
        return [product[:, i // 2, :, :, i % 2].reshape(-1) + c[i] for i in range(4)]

    def shuffle(self, value: Value, distance: int) -> Value:
        """Returns another lane's value."""
        return value[np.arange(THREADS) ^ distance]

    def meet(self) -> None:
        """Does nothing: every operation is that of all threads."""

    def publish(self) -> None:
        """Does nothing."""

    def barrier(self) -> None:
        """Does nothing."""


def _bfloats(word: Value) -> Any:
    """Returns the two bfloat16 of each word as float32, [threads, 2]."""
    return np.stack([word << 16 & 0xFFFF0000, word & 0xFFFF0000], axis=-1).astype(np.uint32).view(np.float32)


type Program = Callable[[Lanes, Sequence[Any], Sequence[Registers]], Sequence[Registers]]


def simulate(program: Program, refs: Sequence[Any], arrays: Sequence[Any], out: Sequence[Any], stored: int) -> Any:
    """Runs a program on all threads of a warpgroup, from within a simulated kernel.

    Args:
      program: takes lanes, the contents of references and registers, and returns registers.
      refs: references of any kind.
      arrays: int32 words or float32, [64, columns].
      out: shape and dtype of what the program returns, of the same kinds.
      stored: how many of the references, the first ones, keep what the program stores in them; in others it is lost.
    """

    def call(*given: Any) -> tuple[Any, ...]:
        host = [np.array(each) for each in given]
        contents = [each.view(np.uint8) for each in host[: len(refs)]]
        found = program(SimulatedLanes(), contents, [_registers(each) for each in host[len(refs) :]])
        return *(_array(each, like) for each, like in zip(found, out, strict=True)), *host[:stored]

    given = [ref[...] for ref in refs]
    likes = *out, *(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in given[:stored])
    found = jax.pure_callback(call, likes, *given, *arrays)
    for ref, contents in zip(refs, found[len(out) :]):
        ref[...] = contents
    return found[: len(out)]


def _registers(array: Any) -> Registers:
    split = array.reshape(4, 2, 8, -1, 4, 2)  # warp, half, row, column tile, quad, column
    wide = split if array.dtype == np.float32 else split.astype(np.int64) & 0xFFFFFFFF
    return [
        [[wide[:, half, :, tile, :, e].reshape(-1) for e in range(2)] for half in range(2)]
        for tile in range(split.shape[3])
    ]


def _array(registers: Registers, like: Any) -> Any:
    split: Any = np.array(registers).reshape(-1, 2, 2, 4, 8, 4)  # column tile, half, column, warp, row, quad
    array = split.transpose(3, 1, 4, 0, 5, 2).reshape(64, -1)
    return array.astype(np.float32) if like.dtype == jnp.float32 else array.astype(np.uint32).view(np.int32)
