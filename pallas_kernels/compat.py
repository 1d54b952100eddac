"""All that is unstable in Pallas' Mosaic GPU backend, in one place: kernels import this and `lax`, never `plgpu`.

The interface "may change weekly" by its own words; what is written here was checked with jax 0.11.2. Three things
differ between a GPU and the interpreter that stands in for one on a CPU, and each has one place that hides it:

- Operand A of a tensor core instruction may stay in registers on the GPU; the interpreter wants it in shared memory
  (`multiply`).
- int4 codes become numbers by inline PTX on the GPU; the interpreter runs the same map in jnp (`unpack_bf16`,
  `unpack_int8`).
- The copy engine fills what lies outside an array with zeros and drops what is stored there; the interpreter does not,
  so the kernels pad where they are simulated.

Layouts of registers (128 threads, lane l, warp w; `C` the accumulator of 64 rows):

    C            row 16 w + l / 4 (+ 8), column 8 j + 2 (l % 4) (+ 1)
    ROWS         one number for each row of C, COLUMNS one for each column
    packed int4  row 16 w + l / 4 (+ 8), columns 32 j + 8 (l % 4) + 0..7: one register of eight codes
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.order import stored_bf16, stored_int8

Simulation = plgpu.InterpretGPUParams
BlockSpec = plgpu.BlockSpec
Barrier = plgpu.Barrier
SharedMemory = plgpu.SMEM
Accumulator = plgpu.WGMMAAccumulatorRef
arrive, wait = plgpu.barrier_arrive, plgpu.barrier_wait
commit = plgpu.commit_smem
send = plgpu.async_store_smem
copy_in, copy_out, wait_out = plgpu.copy_gmem_to_smem, plgpu.copy_smem_to_gmem, plgpu.wait_smem_to_gmem
pipeline = plgpu.emit_pipeline_warp_specialized
snake = plgpu.planar_snake
loop_over_tiles = plgpu.nd_loop
Stage = plgpu.PipelinePipeline

C: Final = plgpu.Layout.WGMMA
C_TRANSPOSED: Final = plgpu.Layout.WGMMA_TRANSPOSED
PACKED: Final = plgpu.Layout.WGMMA_UPCAST_4X
INT8_OPERAND: Final = plgpu.Layout.WGMMA_8BIT
ROWS: Final = C.reduce(1)
COLUMNS: Final = C.reduce(0)
ROWS_OF_ACCUMULATOR: Final = 64  # what one warpgroup's instruction makes
LEAST_COLUMNS: Final = 8  # of an instruction's result
LEAST_SWIZZLE: Final = 256  # bits of a row
PRODUCER_REGISTERS: Final = 40  # what the warpgroup that only issues copies keeps (Pallas' own advice for Hopper)


def bits_of(dtype: Any) -> int:
    """Returns the bits of one number of a dtype: 4 for int4, which `itemsize` rounds up."""
    info = jnp.iinfo(dtype) if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype)
    return int(info.bits)


def tiled(columns: int, dtype: Any) -> tuple[Any, ...]:
    """Returns the layout of shared memory for tensor cores: tiles of 8 rows, swizzled, of at most 128 bytes a row."""
    bits = bits_of(dtype)
    swizzle = plgpu.find_swizzle(columns * bits)
    tiling: Any = plgpu.TilingTransform  # its base class only looks abstract to a type checker
    swizzling: Any = plgpu.SwizzleTransform
    return tiling((8, 8 * swizzle // bits)), swizzling(swizzle)


def kernel(
    body: Callable[..., None],
    *,
    out: Any,
    scratch: dict[str, Any],
    grid: dict[str, int],
    cluster: dict[str, int] | None = None,
    warpgroups: int = 1,
    manual_barriers: bool = False,
    simulate: Simulation | None = None,
) -> Callable[..., Any]:
    """Wraps `body` as a Mosaic GPU kernel whose warpgroups find their index under "wg".

    Args:
      body: takes the references of inputs, output and scratch; one warpgroup's program.
      out: the output's shape and dtype.
      scratch: shared memory and barriers, by the name of the body's argument.
      grid: how many blocks there are along each named axis, the slowest first.
      cluster: how many neighbouring blocks share their shared memory along each named axis.
      warpgroups: how many warpgroups of 128 threads a block has.
      manual_barriers: the body orders its own accesses to shared memory; Pallas adds no barrier.
      simulate: run in the interpreter on the CPU with these settings; None to compile for the GPU.
    """
    cluster = cluster or {}
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        cluster=tuple(cluster.values()),
        cluster_names=tuple(cluster),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            unsafe_no_auto_barriers=manual_barriers,
            reduction_scratch_bytes=0,  # Pallas has one for all warpgroups: a reduction over warps would mix them
        ),
        interpret=simulate,
    )


def load(ref: Any, layout: Any, *, checked: bool = True) -> Any:
    """Loads a reference into registers; `checked` refuses a load that is slow for want of a matching layout."""
    return plgpu.load(ref, layout=layout, optimized=checked)


def cast(values: Any, layout: Any) -> Any:
    """Moves values between threads into another layout of registers."""
    return plgpu.layout_cast(values, layout)


def along_rows(values: Any, shape: tuple[int, int]) -> Any:
    """Spreads one number for each row over the columns."""
    return lax.broadcast_in_dim(values, shape, [0])


def along_columns(values: Any, shape: tuple[int, int]) -> Any:
    """Spreads one number for each column over the rows."""
    return lax.broadcast_in_dim(values, shape, [1])


def multiply(accumulator: Any, a: Any, b: Any, bounce: Any = None) -> None:
    """Starts accumulator += a @ b on the tensor cores, a in registers or in shared memory.

    Args:
      accumulator: float32 or int32 [rows, columns].
      a: [rows, depth], a value or a reference.
      b: the reference to [depth, columns], a transposed view.
      bounce: shared memory for `a` where it is a value and the kernel is simulated.
    """
    if bounce is not None:
        bounce[...] = a
        plgpu.commit_smem()
        a = bounce
    plgpu.wgmma(accumulator, a, b)


def finish(pending: int = 0) -> None:
    """Waits until at most `pending` products that this warpgroup started are unfinished."""
    plgpu.wgmma_wait(pending)


def _words(registers: Any) -> Any:
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


def _place(shape: tuple[int, ...], row: int, column: int, half: int) -> tuple[int, ...]:
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
        pairs = [{half: _pair(row.registers[0, 0, half, 0, 0]) for half in range(2)} for row in rows]
        for index, word in _words(packed.registers):
            half = index[4]
            words = _assemble(ptx, 4, [word, *(pair_of[half] for pair_of in pairs)])
            for i in range(4):
                out[_place(out.shape, index[0], 4 * index[1] + i, half)] = mgpu.utils.bitcast(words[i], pair)
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
        for index, word in _words(packed.registers):
            words = _assemble(_PTX_INT8, 2, [word])
            for i in range(2):
                out[_place(out.shape, index[0], 2 * index[1] + i, index[4])] = mgpu.utils.bitcast(words[i], four)
        return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=True)

    inline: Any = plgpu.inline_mgpu(
        arg_types=(PACKED,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.int8, INT8_OPERAND)
    )
    return inline(convert)(load(codes, PACKED))


def in_scope(function: Callable[..., Any], *allocations: Any) -> Any:
    """Calls `function` with references to memory that lives for the call; an accumulator is such memory."""
    return pl.run_scoped(function, *allocations)


def whole_tiles(size: int, tile: int) -> int:
    """Returns how many tiles cover `size`."""
    return math.ceil(size / tile)


def columns_of(tokens: int, *, integer: bool) -> int:
    """Returns how many tokens the tensor cores' instruction multiplies: 8, 16, 24, .., of integers 48 and 64 after 32.

    Example:
      >>> columns_of(33, integer=False), columns_of(33, integer=True)
      (40, 48)
    """
    step = 2 * LEAST_COLUMNS if integer and tokens > 4 * LEAST_COLUMNS else LEAST_COLUMNS
    return step * whole_tiles(tokens, step)


def races_found() -> bool:
    """Tells whether the last simulated kernel had a data race."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    return bool(gpu_callbacks.get_races().races_found)


@contextlib.contextmanager
def kernel_times() -> Iterator[list[float]]:
    """Yields a list that holds, after the block, the microseconds of each GPU kernel that ran in it, in order."""
    from jax._src.lib import mosaic_gpu

    library: Any = vars(mosaic_gpu)["_mosaic_gpu_ext"]
    found: list[float] = []
    library._cupti_init()
    try:
        yield found
    finally:
        found += [1e3 * milliseconds for _, milliseconds in library._cupti_get_timings(True)]
