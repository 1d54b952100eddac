"""All that is unstable in Pallas' Mosaic GPU backend, here and in `inline`: kernels import these, never `plgpu`.

The interface "may change weekly" by its own words; what is written here was checked with jax 0.11.2. Three things
differ between a GPU and the interpreter that stands in for one on a CPU, and each has one place that hides it:

- Operand A of a tensor core instruction may stay in registers on the GPU; the interpreter wants it in shared memory
  (`multiply`).
- Codes become numbers by inline code on the GPU; the interpreter runs the same map in jnp (`inline`).
- The copy engine fills what lies outside an array with zeros and drops what is stored there; the interpreter does not,
  so the kernels pad where they are simulated.

What a GPU refuses and nothing before it notices: a copy into shared memory at an address that is no multiple of 128
bytes (it dies of a "misaligned address": half a row of 64 scales of 2 bytes is enough), and copies of contiguous memory
do not cut what lies outside an array as copies of tiles do.

Layouts of registers (128 threads, lane l, warp w; `C` the accumulator of 64 rows):

    C            row 16 w + l / 4 (+ 8), column 8 j + 2 (l % 4) (+ 1)
    ROWS         one number for each row of C, COLUMNS one for each column
    packed int4  row 16 w + l / 4 (+ 8), columns 32 j + 8 (l % 4) + 0..7: one register of eight codes
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Final

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

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
COLUMN_BF16: Final = plgpu.Layout.MMA_RHS(jnp.bfloat16)  # operand B of a warp's instruction
COLUMN_INT8: Final = plgpu.Layout.MMA_RHS(jnp.int8)
ROWS: Final = C.reduce(1)
COLUMNS: Final = C.reduce(0)
ROWS_OF_ACCUMULATOR: Final = 64  # what one warpgroup's instruction makes
RUN_OF_ROW: Final = 8  # numbers of a row that a thread holds side by side
LEAST_COLUMNS: Final = 8  # of an instruction's result
THREADS: Final = 128  # of a warpgroup
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
    reduction_bytes: int = 0,
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
      reduction_bytes: of the scratch memory of reductions over warps. Pallas has one for all warpgroups of a block,
        which would mix them: for blocks of one warpgroup alone.
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
        kernel_name=getattr(body, "func", body).__module__.rpartition(".")[-1],  # what profiles show
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            unsafe_no_auto_barriers=manual_barriers,
            reduction_scratch_bytes=reduction_bytes,
        ),
        interpret=simulate,
    )


def line(numbers: int) -> Any:
    """Returns the layout of a vector whose numbers lie with neighbouring threads of a warpgroup, as many with each."""
    return plgpu.Layout.WG_STRIDED((numbers,), vec_size=numbers // THREADS)


def strided(numbers: int) -> Any:
    """Returns the layout of a row of numbers spread over a warpgroup in runs of 8, 16 bytes of bfloat16."""
    layout: Any = plgpu.Layout.WG_STRIDED
    return layout((numbers,), vec_size=RUN_OF_ROW)


def load(ref: Any, layout: Any, *, checked: bool = True) -> Any:
    """Loads a reference into registers; `checked` refuses a load that is slow for want of a matching layout."""
    return plgpu.load(ref, layout=layout, optimized=checked)


def cast(values: Any, layout: Any) -> Any:
    """Moves values between threads into another layout of registers."""
    return plgpu.layout_cast(values, layout)


def iota(shape: tuple[int, int], axis: int, layout: Any) -> Any:
    """Returns each number's place along an axis, int32."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)


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
def kernel_times() -> Iterator[list[tuple[str, float]]]:
    """Yields a list that holds, after the block, names and microseconds of the GPU kernels that ran in it, in order."""
    from jax._src.lib import mosaic_gpu

    library: Any = vars(mosaic_gpu)["_mosaic_gpu_ext"]
    found: list[tuple[str, float]] = []
    library._cupti_init()
    try:
        yield found
    finally:
        found += [(name, 1e3 * milliseconds) for name, milliseconds in library._cupti_get_timings(True)]
