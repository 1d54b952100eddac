"""The operations of `lanes.Lanes` as instructions of a Hopper GPU, and how a kernel calls a program of them."""

from collections.abc import Sequence
from typing import Any, final

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, vector

from pallas_kernels.compat import C
from pallas_kernels.lanes import Lanes, Program, Registers, Value, simulate

WIDEST: int = 4  # words of one load


@final
class GpuLanes(Lanes):
    """One thread; a value is an MLIR value."""

    def __init__(self) -> None:
        """Finds the thread's place. Must be made where instructions are being emitted."""
        self._word, self._float = ir.IntegerType.get_signless(32), ir.F32Type.get()
        thread = mgpu.utils.thread_idx()
        self.warp = arith.remui(arith.divui(thread, self.word(32)), self.word(4))
        self.row = arith.divui(arith.remui(thread, self.word(32)), self.word(4))
        self.quad = arith.remui(thread, self.word(4))

    def word(self, value: int) -> Value:
        """Returns a constant."""
        constant: Any = arith.constant  # its wrapper is wrongly typed
        return constant(self._word, value - (1 << 32) if value >= 1 << 31 else value)

    def number(self, value: float) -> Value:
        """Returns a float32 constant."""
        constant: Any = arith.constant
        return constant(self._float, value)

    def offset(self, start: int, *terms: tuple[Value, int]) -> Value:
        """Returns start + sum of word * factor."""
        total = self.word(start)
        for value, factor in terms:
            total = arith.addi(total, arith.muli(value, self.word(factor)))
        return total

    def xor(self, a: Value, b: Value) -> Value:
        """Returns the exclusive or of two words."""
        return arith.xori(a, b)

    def least(self, a: Value, bound: int) -> Value:
        """Returns the lesser of a word and a constant."""
        return arith.minui(a, self.word(bound))

    def field(self, word: Value, shift: int, mask: int, bias: int) -> Value:
        """Returns (word >> shift) & mask | bias."""
        if shift:
            word = arith.shrui(word, self.word(shift)) if shift > 0 else arith.shli(word, self.word(-shift))
        if not bias:
            return arith.andi(word, self.word(mask))
        ptx = f"{{ .reg .b32 bias; mov.b32 bias, {bias}; lop3.b32 $0, $1, {mask}, bias, 0xEA; }}"
        return mgpu.utils.inline_ptx(ptx, word, result_types=self._word)  # two operations for two constants otherwise

    def pick(self, low: Value, high: Value, selector: int) -> Value:
        """Returns four bytes of two words."""
        return mgpu.utils.inline_ptx(f"prmt.b32 $0, $1, $2, {selector};", low, high, result_types=self._word)

    def load(self, ref: Any, offset: Value, count: int) -> list[Value]:
        """Returns words at a byte of a reference."""
        found = []
        pointer, byte = mgpu.utils.memref_ptr(ref), ir.IntegerType.get_signless(8)
        for start in range(0, count, WIDEST):
            words = min(count - start, WIDEST)
            place = mgpu.utils.getelementptr(pointer, [arith.addi(offset, self.word(4 * start))], byte)
            loaded = llvm.load(ir.VectorType.get((words,), self._word), place, alignment=4 * words)
            found += [vector.extract(loaded, [], [i]) for i in range(words)]
        return found

    def store(self, ref: Any, offset: Value, value: Value) -> None:
        """Stores a float32."""
        place = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [offset], ir.IntegerType.get_signless(8))
        llvm.store(value, place, alignment=4)

    def store_word(self, ref: Any, offset: Value, word: Value, condition: Value) -> None:
        """Stores a word where a condition holds."""
        with mgpu.utils.when(condition):
            place = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [offset], ir.IntegerType.get_signless(8))
            llvm.store(word, place, alignment=4)

    def reciprocal(self, a: Value) -> Value:
        """Returns 1 / a."""
        return mgpu.utils.inline_ptx("rcp.approx.ftz.f32 $0, $1;", a, result_types=self._float)

    def divide(self, a: Value, b: Value) -> Value:
        """Returns a / b."""
        return mgpu.utils.inline_ptx("div.rn.f32 $0, $1, $2;", a, b, result_types=self._float)

    def pack_halves(self, low: Value, high: Value) -> Value:
        """Returns the word of two float32 rounded to float16."""
        return mgpu.utils.inline_ptx("cvt.rn.f16x2.f32 $0, $1, $2;", high, low, result_types=self._word)

    def bits(self, a: Value) -> Value:
        """Returns the bits of a float32."""
        return arith.bitcast(self._word, a)

    def halves(self, word: Value) -> tuple[Value, Value]:
        """Returns the two float16 of a word."""
        pair = mgpu.utils.bitcast(word, ir.VectorType.get((2,), ir.F16Type.get()))
        low, high = (arith.extf(self._float, vector.extract(pair, [], [i])) for i in range(2))
        return low, high

    def floats(self, word: Value) -> Value:
        """Returns a word's bits as a float32."""
        return arith.bitcast(self._float, word)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """Returns a * b + c."""
        return math.fma(a, b, c)

    def multiply(self, a: Value, b: Value) -> Value:
        """Returns a * b."""
        return arith.mulf(a, b)

    def add(self, a: Value, b: Value) -> Value:
        """Returns a + b."""
        return arith.addf(a, b)

    def subtract(self, a: Value, b: Value) -> Value:
        """Returns a - b."""
        return arith.subf(a, b)

    def larger(self, a: Value, b: Value) -> Value:
        """Returns the larger of two float32."""
        return mgpu.utils.inline_ptx("max.f32 $0, $1, $2;", a, b, result_types=self._float)

    def exp2(self, a: Value) -> Value:
        """Returns 2^a."""
        return mgpu.utils.inline_ptx("ex2.approx.ftz.f32 $0, $1;", a, result_types=self._float)

    def below(self, a: Value, b: Value) -> Value:
        """Tells whether one word is less than another."""
        return arith.cmpi(arith.CmpIPredicate.slt, a, b)

    def less(self, a: Value, b: Value) -> Value:
        """Tells whether one float32 is less than another."""
        return arith.cmpf(arith.CmpFPredicate.OLT, a, b)

    def select(self, condition: Value, yes: Value, no: Value) -> Value:
        """Returns one of two numbers."""
        return arith.select(condition, yes, no)

    def pack(self, low: Value, high: Value) -> Value:
        """Returns the word of two float32 rounded to bfloat16."""
        return mgpu.utils.inline_ptx("cvt.rn.bf16x2.f32 $0, $1, $2;", high, low, result_types=self._word)

    def multiply_pairs(self, a: Value, b: Value) -> Value:
        """Returns the word of two products of bfloat16."""
        return mgpu.utils.inline_ptx("mul.rn.bf16x2 $0, $1, $2;", a, b, result_types=self._word)

    def transpose(self, word: Value) -> Value:
        """Returns the word of the transposed matrix."""
        return mgpu.utils.inline_ptx(
            "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", word, result_types=self._word, convergent=True
        )

    def mma(self, a: Sequence[Value], b: Sequence[Value], c: Sequence[Value]) -> list[Value]:
        """Returns A B + C."""
        names = [f"${i}" for i in range(14)]
        groups = (", ".join(names[i:j]) for i, j in ((0, 4), (4, 8), (8, 10), (10, 14)))
        ptx = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{}}}, {{{}}}, {{{}}}, {{{}}};".format(*groups)
        return list(mgpu.utils.inline_ptx(ptx, *a, *b, *c, result_types=[self._float] * 4, convergent=True))

    def shuffle(self, value: Value, distance: int) -> Value:
        """Returns another lane's value."""
        return mgpu.utils.shfl_bfly(value, distance)

    def meet(self) -> None:
        """Waits for all threads of the warpgroup."""
        mgpu.utils.warpgroup_barrier()

    def publish(self) -> None:
        """Lets copies see what this thread stored, which another thread may start: PTX ISA, "Async proxy".

        That thread is one of the same block, behind a barrier that all who stored came to: the barrier orders stores
        and copy for the block, the fence in each thread that stored orders them between the two ways to memory. A
        fence for the whole GPU is not needed: no other block reads, and a kernel's end is one.
        """
        mgpu.utils.inline_ptx("fence.proxy.async;", has_side_effects=True)

    def barrier(self) -> None:
        """Waits for all threads of the warpgroup, and what they stored."""
        mgpu.utils.commit_shared()


def run(
    program: Program,
    refs: Sequence[Any],
    arrays: Sequence[Any],
    out: Sequence[Any],
    stored: int = 0,
    *,
    simulated: bool,
) -> Any:
    """Runs a program on the threads of this warpgroup.

    Args:
      program: takes lanes, references and registers, and returns registers.
      refs: references to contiguous memory.
      arrays: int32 words or float32, [64, columns], in layout `compat.C`.
      out: shape and dtype of what the program returns, of the same kinds.
      stored: how many of the references, the first ones, are stored in; what else is, is scratch memory.
      simulated: run on all threads at once in numpy.
    """
    if simulated:
        return simulate(program, refs, arrays, out, stored)

    def emit(_: Any, *given: Any) -> tuple[Any, ...]:
        registers = [_registers(each) for each in given[len(refs) :]]
        found = program(GpuLanes(), given[: len(refs)], registers)
        return tuple(_fragment(each, like) for each, like in zip(found, out, strict=True))

    inline: Any = plgpu.inline_mgpu(
        arg_types=(*(plgpu.RefType() for _ in refs), *(C for _ in arrays)),
        return_type=tuple(plgpu.ShapeDtypeStruct(like.shape, like.dtype, C) for like in out),
    )
    return inline(emit)(*refs, *arrays)


def _registers(fragment: Any) -> Registers:
    """Returns a fragment's numbers by (column tile, half, column)."""
    array = fragment.registers
    return [
        [[vector.extract(array[0, tile, 0, 0, half].item(), [], [e]) for e in range(2)] for half in range(2)]
        for tile in range(array.shape[1])
    ]


def _fragment(registers: Registers, like: Any) -> Any:
    layout = C.to_mgpu()
    element = ir.F32Type.get() if like.dtype == jnp.float32 else ir.IntegerType.get_signless(32)
    out = np.empty(layout.registers_shape(like.shape), dtype=object)
    for tile, halves in enumerate(registers):
        for half, pair in enumerate(halves):
            place = [0] * out.ndim
            place[1], place[4] = tile, half
            out[tuple(place)] = vector.from_elements(ir.VectorType.get((2,), element), pair)
    signed = None if like.dtype == jnp.float32 else True
    return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=signed)
