"""What kernels compute in registers by inline code, where Pallas has no operation: the other half of `compat`.

Each function turns what a thread loaded into what its tensor core operand needs, register by register, and has the same
map in jnp for the interpreter. Layouts of registers are those of `compat`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, memref, vector

from pallas_kernels.compat import INT8_OPERAND, PACKED, ROWS, C, along_rows, load
from pallas_kernels.fields import BLOCK, BLOCKS, FIELDS, THREES, WORDS, load_signs, load_threes, places_of_signs
from pallas_kernels.order import stored_bf16, stored_int8

BYTES: Final = 0x01010101  # a bit of each byte of a word
HALVES: Final = 0x00010001  # a bit of each half
BIAS: Final = 0x43004300  # 128 in bfloat16, twice: 128 + a code below 128 has the code in its last bits
ROWS_OF_GRID: Final = 16  # outputs that share the grid of their scales: a warp's rows
SLOTS: Final = 16  # of outliers: four threads of each of four warpgroups
PARTS_OF_GRID: Final = 4  # base and step of scales, base and step of zeros


def words_of(registers: Any) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yields the index of each register in an array, and the register as a word."""
    word = ir.IntegerType.get_signless(32)
    for index, register in np.ndenumerate(registers):
        yield index, mgpu.utils.bitcast(register, word)


def _assemble(ptx: str, outputs: int, operands: Sequence[Any]) -> list[Any]:
    word = ir.IntegerType.get_signless(32)
    result = llvm.inline_asm(
        llvm.StructType.get_literal([word] * outputs),
        list(operands),
        ptx,
        ",".join(["=r"] * outputs + ["r"] * len(operands)),
    )
    return [llvm.extractvalue(word, result, (index,)) for index in range(outputs)]


def place_of(shape: tuple[int, ...], row: int, column: int, half: int) -> tuple[int, ...]:
    """Returns the index of a register in the array [row tiles, column tiles, 1, 1, halves, 1, ..] of a fragment."""
    index = [0] * len(shape)
    index[0], index[1], index[4] = row, column, half
    return tuple(index)


def _pair(value: Any) -> Any:
    """Returns the word that holds a bfloat16 register twice."""
    half = mgpu.utils.bitcast(value, ir.IntegerType.get_signless(16))
    word = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(word, [half], "mov.b32 $0, {$1, $1};", "=r,h")


# A nibble n of two's complement becomes the bfloat16 128 + (n ^ 8) = 136 + code when its four bits, the sign flipped,
# are the last of the mantissa of 128 = 0x4300; `lop3` 0x6a is (word & mask) ^ 0x43084308.
_PTX_BF16: Final = """{{ .reg .b32 t1, t2, t3, bias; mov.b32 bias, 0x43084308;
shr.u32 t1, $4, 4; shr.u32 t2, $4, 8; shr.u32 t3, $4, 12;
lop3.b32 $0, $4, 0x000F000F, bias, 0x6a; lop3.b32 $1, t1, 0x000F000F, bias, 0x6a;
lop3.b32 $2, t2, 0x000F000F, bias, 0x6a; lop3.b32 $3, t3, 0x000F000F, bias, 0x6a; {rest} }}"""
_PTX_INT8: Final = "{ .reg .b32 t; shl.b32 t, $2, 4; and.b32 $0, t, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0; }"


def unpack_bf16(codes: Any, shape: tuple[int, int], centers: Any, scales: Any, *, simulated: bool) -> Any:
    """Turns stored codes into the tensor cores' bfloat16 operand scales * (codes - zeros), in registers.

    Args:
      codes: a reference to int4 `shape` in shared memory, in the order of `order.stored_bf16`.
      shape: (rows, columns).
      centers: 136 + zeros for each row, bfloat16 in layout `ROWS`; None for zeros of 0. Exact: all are integers < 256.
      scales: bfloat16 in layout `ROWS`, the product rounded to bfloat16; None for scales of 1.
      simulated: run the map in jnp.
    """
    if simulated:
        values = stored_bf16.invert(codes[...]).astype(jnp.bfloat16)
        if centers is not None:
            values = values - along_rows(centers - jnp.bfloat16(136), shape)
        return values if scales is None else values * along_rows(scales, shape)
    given = [value for value in (centers, scales) if value is not None]

    def convert(_: Any, packed: Any, *rows: Any) -> Any:
        layout = C.to_mgpu()
        out = np.empty(layout.registers_shape(shape), dtype=object)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        center = "$5" if centers is not None else "bias"
        factor = f"${4 + len(rows)}"
        rest = " ".join(f"sub.bf16x2 ${i}, ${i}, {center};" for i in range(4))
        if scales is not None:
            rest += " ".join(f"mul.bf16x2 ${i}, ${i}, {factor};" for i in range(4))
        ptx = _PTX_BF16.format(rest=rest)
        pairs = [
            {place: _pair(row.registers[place[0], 0, place[1], 0, 0]) for place in np.ndindex(out.shape[0], 2)}
            for row in rows
        ]
        for index, word in words_of(packed.registers):
            half = index[4]
            words = _assemble(ptx, 4, [word, *(pair_of[index[0], half] for pair_of in pairs)])
            for i in range(4):
                out[place_of(out.shape, index[0], 4 * index[1] + i, half)] = mgpu.utils.bitcast(words[i], pair)
        return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=None)

    inline: Any = plgpu.inline_mgpu(
        arg_types=(PACKED, *(ROWS for _ in given)), return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, C)
    )
    return inline(convert)(load(codes, PACKED), *given)


def unpack_int8(codes: Any, shape: tuple[int, int], *, simulated: bool) -> Any:
    """Turns stored codes into the tensor cores' int8 operand 16 * codes, in registers.

    Args:
      codes: a reference to int4 `shape` in shared memory, in the order of `order.stored_int8`.
      shape: (rows, columns).
      simulated: run the map in jnp.
    """
    if simulated:
        return stored_int8.invert(codes[...]).astype(jnp.int8) * jnp.int8(16)

    def convert(_: Any, packed: Any) -> Any:
        layout = INT8_OPERAND.to_mgpu()
        out = np.empty(layout.registers_shape(shape), dtype=object)
        four = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        for index, word in words_of(packed.registers):
            words = _assemble(_PTX_INT8, 2, [word])
            for i in range(2):
                out[place_of(out.shape, index[0], 2 * index[1] + i, index[4])] = mgpu.utils.bitcast(words[i], four)
        return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=True)

    inline: Any = plgpu.inline_mgpu(
        arg_types=(PACKED,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.int8, INT8_OPERAND)
    )
    return inline(convert)(load(codes, PACKED))


def unpack_signs(packed: Any, bits: int, *, simulated: bool) -> Any:
    """Turns stored signs into the int8 operands 2^p * sign of all planes, side by side.

    Args:
      packed: int4 [rows, in * bits / 4] in layout `PACKED`, in the order of `fields.store_signs`.
      bits: planes.
      simulated: run the map in jnp.

    Returns:
      int8 [rows, bits * in], 2^p or 0 for plane p; plane 0 first.
    """
    rows, stored = packed.shape
    inputs = 4 * stored // bits
    if simulated:
        codes = load_signs(packed, bits)
        return jnp.concatenate([codes & jnp.int8(2**plane) for plane in range(bits)], axis=1)
    shape = (rows, bits * inputs)

    def convert(_: Any, packed: Any) -> Any:
        layout = INT8_OPERAND.to_mgpu()
        out = np.empty(layout.registers_shape(shape), dtype=object)
        four = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        loaded = _by_place(packed)
        for row in range(rows // 64):
            for half in range(2):
                for run in range(inputs // (BLOCK * BLOCKS[bits])):
                    for (block, plane), (word, bit) in places_of_signs(bits).items():
                        value = _shifted(loaded[row, run * WORDS[bits] + word, half], bit - plane)
                        value = arith.andi(value, word_of(BYTES << plane))
                        column = plane * (inputs // BLOCK) + run * BLOCKS[bits] + block
                        out[place_of(out.shape, row, column, half)] = mgpu.utils.bitcast(value, four)
        return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=True)

    inline: Any = plgpu.inline_mgpu(
        arg_types=(PACKED,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.int8, INT8_OPERAND)
    )
    return inline(convert)(packed)


def unpack_threes(packed: Any, *, simulated: bool) -> Any:
    """Turns one run of stored 3-bit codes into the bfloat16 operand 128 + code.

    Args:
      packed: int4 [rows, 96] in layout `PACKED`, in the order of `fields.store_threes`.
      simulated: run the map in jnp.
    """
    shape = (packed.shape[0], THREES)
    if simulated:
        return load_threes(packed).astype(jnp.bfloat16) + jnp.bfloat16(128)

    def convert(_: Any, packed: Any) -> Any:
        layout = C.to_mgpu()
        out = np.empty(layout.registers_shape(shape), dtype=object)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        loaded = _by_place(packed)
        for row in range(shape[0] // 64):
            for half in range(2):
                words = [loaded[row, word, half] for word in range(3)]
                values = [
                    arith.andi(_shifted(words[column // FIELDS], 3 * (column % FIELDS)), word_of(7 * HALVES))
                    for column in range(15)
                ]
                top = [arith.andi(_shifted(word, 15 - i), word_of(HALVES << i)) for i, word in enumerate(words)]
                values.append(arith.ori(arith.ori(top[0], top[1]), top[2]))
                for column, value in enumerate(values):
                    biased = arith.ori(value, word_of(BIAS))
                    out[place_of(out.shape, row, column, half)] = mgpu.utils.bitcast(biased, pair)
        return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=None)

    inline: Any = plgpu.inline_mgpu(arg_types=(PACKED,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, C))
    return inline(convert)(packed)


def two_level_grids(codes: Any, grids: Any, *, simulated: bool) -> tuple[Any, Any]:
    """Returns scales and zeros of groups, each base + step * code, base and step shared by 16 rows: float32 in `C`.

    Args:
      codes: a reference to int8 [64, groups], a scale's code in the low four bits and a zero's in the high.
      grids: a reference to float16 [groups, 16]: for each run of 16 rows the four numbers of `PARTS_OF_GRID`.
      simulated: run the map in jnp.
    """
    shape = codes.shape[-2:]
    if simulated:
        code = codes[...].astype(jnp.int32)
        parts = jnp.repeat(grids[...].astype(jnp.float32).reshape(shape[1], -1, PARTS_OF_GRID), ROWS_OF_GRID, axis=1).T
        of_code = [(code >> (4 * i) & 15).astype(jnp.float32) for i in range(2)]
        return parts[0] + parts[1] * of_code[0], parts[2] + parts[3] * of_code[1]

    def convert(_: Any, codes: Any, grids: Any) -> Any:
        layout, whole = C.to_mgpu(), ir.IntegerType.get_signless(32)
        float32, index = ir.F32Type.get(), ir.IndexType.get()
        found = [np.empty(layout.registers_shape(shape), dtype=object) for _ in range(2)]
        thread = mgpu.utils.thread_idx()
        warp = arith.remui(arith.divui(thread, word_of(32)), word_of(4))
        start = arith.index_cast(index, arith.muli(warp, word_of(PARTS_OF_GRID)))
        first = arith.muli(arith.remui(thread, word_of(4)), word_of(2))
        for column in range(shape[1] // 8):
            parts = []
            for e in range(2):
                group = arith.index_cast(index, arith.addi(first, word_of(8 * column + e)))
                loaded = vector.load(ir.VectorType.get((PARTS_OF_GRID,), ir.F16Type.get()), grids, [group, start])
                parts.append([arith.extf(float32, vector.extract(loaded, [], [i])) for i in range(PARTS_OF_GRID)])
            for half in range(2):
                place = place_of(found[0].shape, 0, column, half)
                values: list[list[Any]] = [[], []]
                for e in range(2):
                    code = arith.extui(whole, vector.extract(codes.registers[place], [], [e]))
                    for i, part in enumerate((arith.andi(code, word_of(15)), arith.shrui(code, word_of(4)))):
                        number = arith.uitofp(float32, part)
                        values[i].append(math.fma(parts[e][2 * i + 1], number, parts[e][2 * i]))
                for i in range(2):
                    found[i][place] = vector.from_elements(ir.VectorType.get((2,), float32), values[i])
        return tuple(mgpu.FragmentedArray(_registers=each, _layout=layout, _is_signed=None) for each in found)

    result = plgpu.ShapeDtypeStruct(shape, jnp.float32, C)
    inline: Any = plgpu.inline_mgpu(arg_types=(C, plgpu.RefType()), return_type=(result, result))
    scales, zeros = inline(convert)(load(codes, C, checked=False), grids)
    return scales, zeros


def load_packed(codes: Any, *, simulated: bool) -> Any:
    """Loads words into registers for `unpack_signs` and `unpack_threes`."""
    return codes[...] if simulated else load(codes, PACKED)


def _by_place(packed: Any) -> dict[tuple[int, int, int], Any]:
    """Returns words by (tile of 64 rows, column of words, half of the rows), columns counted from 0."""
    return {(index[0], index[1], index[4]): word for index, word in words_of(packed.registers)}


def _shifted(word: Any, bits: int) -> Any:
    return arith.shrui(word, word_of(bits)) if bits else word


def word_of(value: int) -> Any:
    """Returns a constant of 32 bits."""
    constant: Any = arith.constant  # its wrapper is wrongly typed
    return constant(ir.IntegerType.get_signless(32), value)


def gathered(values: Any, rows: Any, x: Any, warpgroup: Any, warpgroups: int, *, simulated: bool) -> Any:
    """Returns sums of values * x[rows], float32 [64, 8 tokens] in `C`: a token's sum is that of its eight columns.

    Each of a block's warpgroups adds up its own part of the slots, each of the four threads of a row its own of these.

    Args:
      values: a reference to float16 [64, slots] in the GPU's memory, slots a multiple of `SLOTS`.
      rows: likewise, uint16, which of x each is multiplied by.
      x: a reference to bfloat16 [tokens, in] in the GPU's memory.
      warpgroup: the number of this one.
      warpgroups: how many there are, 1, 2 or 4.
      simulated: run the map in jnp.
    """
    (height, slots), tokens = values.shape, x.shape[0]
    shape = (height, 8 * tokens)
    if simulated:
        mine = (jnp.arange(slots) // 4 % warpgroups) == warpgroup
        of_rows = x[...].astype(jnp.float32)[:, rows[...].astype(jnp.int32)]
        sums = jnp.sum(of_rows * jnp.where(mine[None], values[...].astype(jnp.float32), 0.0)[None], axis=2)
        return jnp.pad(sums[:, :, None], ((0, 0), (0, 0), (0, 7))).transpose(1, 0, 2).reshape(shape)

    def convert(_: Any, values: Any, rows: Any, x: Any) -> Any:
        layout = C.to_mgpu()
        whole, float32, index = ir.IntegerType.get_signless(32), ir.F32Type.get(), ir.IndexType.get()
        out = np.empty(layout.registers_shape(shape), dtype=object)
        zero = arith.uitofp(float32, word_of(0))
        thread = mgpu.utils.thread_idx()
        mine = arith.remui(arith.divui(thread, word_of(128)), word_of(warpgroups))
        lane, warp = arith.remui(thread, word_of(32)), arith.remui(arith.divui(thread, word_of(32)), word_of(4))
        top = arith.addi(arith.muli(warp, word_of(16)), arith.divui(lane, word_of(4)))
        first = arith.addi(arith.muli(mine, word_of(4)), arith.remui(lane, word_of(4)))
        of_tokens = [arith.index_cast(index, word_of(token)) for token in range(tokens)]
        for half in range(2):
            row = arith.index_cast(index, arith.addi(top, word_of(8 * half)))
            sums = [zero] * tokens
            for start in range(0, slots, 4 * warpgroups):
                slot = arith.index_cast(index, arith.addi(first, word_of(start)))
                value = arith.extf(float32, memref.load(values, [row, slot]))
                place = arith.index_cast(index, arith.extui(whole, memref.load(rows, [row, slot])))
                for token in range(tokens):
                    other = arith.extf(float32, memref.load(x, [of_tokens[token], place]))
                    sums[token] = math.fma(value, other, sums[token])
            for token in range(tokens):
                pair = vector.from_elements(ir.VectorType.get((2,), float32), [sums[token], zero])
                out[place_of(out.shape, 0, token, half)] = pair
        return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=None)

    inline: Any = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, C),
    )
    return inline(convert)(values, rows, x)
