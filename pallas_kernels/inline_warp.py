"""Products by each warp's own instruction, `mma.sync`, whose cost grows with the columns; a warpgroup's has a least.

As `inline`: registers on a GPU, the same map in jnp in the interpreter. A warp's instruction multiplies 16 rows by 16
inputs (32 of int8) by 8 columns. Lane l of a warp holds of operand B column l / 4, inputs 2 (l % 4) and 8 more.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.compat import COLUMN_BF16, COLUMN_INT8, INT8_OPERAND, LEAST_COLUMNS, C, load
from pallas_kernels.inline import place_of, word_of

ONES: Final = 0x3F803F80  # 1 in bfloat16, twice
STEP: Final = 16  # inputs of an instruction's bfloat16 operands
INTEGER_STEP: Final = 32


def _instruction(words: Sequence[Any], values: Sequence[Any], *, integer: bool = False) -> list[Any]:
    """Returns values + A B of one instruction: four words of A and two of B."""
    step, types = (INTEGER_STEP, "s32.s8.s8.s32") if integer else (STEP, "f32.bf16.bf16.f32")
    names = [f"${i}" for i in range(14)]
    groups = (", ".join(names[i:j]) for i, j in ((0, 4), (4, 8), (8, 10), (10, 14)))
    ptx = "mma.sync.aligned.m16n8k{}.row.col.{} {{{}}}, {{{}}}, {{{}}}, {{{}}};".format(step, types, *groups)
    element = ir.IntegerType.get_signless(32) if integer else ir.F32Type.get()
    return list(mgpu.utils.inline_ptx(ptx, *words, *values, result_types=[element] * 4, convergent=True))


def _nothing() -> list[Any]:
    return [arith.uitofp(ir.F32Type.get(), word_of(0))] * 4


def _pairs(values: Sequence[Any], element: Any) -> list[Any]:
    """Returns the registers of the upper and the lower eight rows."""
    return [vector.from_elements(ir.VectorType.get((2,), element), values[2 * i : 2 * i + 2]) for i in range(2)]


def _of_a(a: Any, row: int, step: int) -> list[Any]:
    """Returns the words of operand A of one instruction: two columns of tiles, and of each both halves."""
    places = [place_of(a.registers.shape, row, 2 * step + i, half) for i in range(2) for half in range(2)]
    word = ir.IntegerType.get_signless(32)
    return [mgpu.utils.bitcast(a.registers[place], word) for place in places]


def product(a: Any, b: Any, *, simulated: bool) -> Any:
    """Returns a b.

    Args:
      a: bfloat16 [rows, depth] in layout `C`, or int8 in `INT8_OPERAND`.
      b: [depth, columns], as `load_columns` returns it.
      simulated: run the map in jnp.

    Returns:
      float32 or int32 [rows, columns] in layout `C`.
    """
    (rows, depth), columns, integer = a.shape, b.shape[1], a.dtype == jnp.int8
    result = jnp.int32 if integer else jnp.float32
    if simulated:
        return jnp.dot(a, b, preferred_element_type=result)
    steps = depth // (INTEGER_STEP if integer else STEP)

    def convert(_: Any, a: Any, b: Any) -> Any:
        layout = C.to_mgpu()
        element = ir.IntegerType.get_signless(32) if integer else ir.F32Type.get()
        out = np.empty(layout.registers_shape((rows, columns)), dtype=object)
        of_b = _of_b(b, steps, columns)
        of_a = [[_of_a(a, row, step) for step in range(steps)] for row in range(rows // 64)]
        for row, column in itertools.product(range(rows // 64), range(columns // 8)):
            values = [word_of(0)] * 4 if integer else _nothing()
            for step in range(steps):
                values = _instruction([*of_a[row][step], *of_b[step][column]], values, integer=integer)
            for half, pair in enumerate(_pairs(values, element)):
                out[place_of(out.shape, row, column, half)] = pair
        return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=True if integer else None)

    layouts = (INT8_OPERAND, COLUMN_INT8) if integer else (C, COLUMN_BF16)
    like = plgpu.ShapeDtypeStruct((rows, columns), result, C)
    inline: Any = plgpu.inline_mgpu(arg_types=layouts, return_type=like)
    return inline(convert)(a, b)


def _of_b(b: Any, steps: int, columns: int) -> list[list[list[Any]]]:
    """Returns the two words of operand B by step and column."""
    word, registers = ir.IntegerType.get_signless(32), b.registers.reshape(steps, columns // 8, 2)
    return [[[mgpu.utils.bitcast(each, word) for each in column] for column in step] for step in registers]


def load_columns(b: Any, *, simulated: bool) -> Any:
    """Loads the reference to [depth, columns], a transposed view, as `product` takes it."""
    if simulated:
        return b[...]
    return load(b, COLUMN_INT8 if b.dtype == jnp.int8 else COLUMN_BF16)


def group_products(a: Any, x: Any, *, simulated: bool) -> tuple[Any, Any]:
    """Returns each group's own products and sums of x: column 8 t + c is that of token t and of the inputs 16 c ..

        products[n, 8 t + c] = sum_i a[n, 16 c + i] x[t, 16 c + i],    sums[n, 8 t + c] = sum_i x[t, 16 c + i]

    A lane's words of x are those of its column's group; each instruction multiplies those of one column alone.

    Args:
      a: bfloat16 [64, 128] in layout `C`.
      x: a reference to bfloat16 [tokens, 128] in shared memory, as it lies in the GPU's.
      simulated: run the map in jnp.

    Returns:
      Both float32 [64, 8 tokens] in layout `C`.
    """
    (rows, depth), tokens = a.shape, x.shape[0]
    groups = depth // STEP
    assert groups == LEAST_COLUMNS
    shape = (rows, groups * tokens)
    if simulated:
        apart = x[...].astype(jnp.float32).reshape(tokens, groups, STEP)
        of_groups = jnp.einsum("ngi,tgi->ntg", a.astype(jnp.float32).reshape(rows, groups, STEP), apart)
        return of_groups.reshape(shape), jnp.broadcast_to(jnp.sum(apart, axis=2).reshape(-1), shape)

    def convert(_: Any, a: Any, x: Any) -> Any:
        layout, word, index = C.to_mgpu(), ir.IntegerType.get_signless(32), ir.IndexType.get()
        found = [np.empty(layout.registers_shape(shape), dtype=object) for _ in range(2)]
        lane = arith.remui(mgpu.utils.thread_idx(), word_of(32))
        mine, first = arith.divui(lane, word_of(4)), arith.muli(arith.remui(lane, word_of(4)), word_of(2))
        start = arith.addi(arith.muli(mine, word_of(STEP)), first)
        is_mine = [arith.cmpi(arith.CmpIPredicate.eq, mine, word_of(group)) for group in range(groups)]
        for token in range(tokens):
            words = []
            for more in (0, 8):
                place = arith.index_cast(index, arith.addi(start, word_of(more)))
                row = arith.index_cast(index, word_of(token))
                pair = vector.load(ir.VectorType.get((2,), ir.BF16Type.get()), x, [row, place])
                words.append(mgpu.utils.bitcast(pair, word))
            products, sums = _nothing(), _instruction([*[word_of(ONES)] * 4, *words], _nothing())
            for group in range(groups):
                of_group = [arith.select(is_mine[group], each, word_of(0)) for each in words]
                products = _instruction([*_of_a(a, 0, group), *of_group], products)
            for out, values in zip(found, (products, sums), strict=True):
                for half, pair in enumerate(_pairs(values, ir.F32Type.get())):
                    out[place_of(out.shape, 0, token, half)] = pair
        return tuple(mgpu.FragmentedArray(_registers=each, _layout=layout, _is_signed=None) for each in found)

    like = plgpu.ShapeDtypeStruct(shape, jnp.float32, C)
    inline: Any = plgpu.inline_mgpu(arg_types=(C, plgpu.RefType()), return_type=(like, like))
    products, sums = inline(convert)(a, x)
    return products, sums
