"""One block of rows rounded in turn, each row's error fed back to those below: what GPTQ, LDLQ and SpQR do.

Outputs (the columns here) are independent of each other. Of a block of B rows P [B, out], as left by all blocks before,
and its triangle of the factor F [B, B], row j gives, from the first to the last,

    x_j = P_j - sum_{i < j} F_ij c_i,        c_j = what rounding x_j changes, which the kinds of rounding define:

    GridRounding        codes = clip(round(x / s) + z, 0, top),   c = (x - s (codes - z)) / F_jj       GPTQ
    OutlierRounding     the same with a real zero inside the round; what costs too much stays a number SpQR
    StepRounding        codes = clip(round(x), low, high),        c = codes - those of the last sweep  LDLQ

The rows of later blocks get F^T c by a matrix product outside. A thread has one column:

    F [B, B]  shared memory     a block of threads has 128 columns. A thread keeps `held` rows in registers: it takes
    c [B, 128]     "            from them what all rows before have changed, then rounds one after another and takes
    P, codes   columns in the   each one's change from the rest. Rows of P, s, z and codes go between memory and
               GPU's memory     registers, 512 bytes of a warpgroup at a time.

The order of subtractions is that of the definition: the interpreter gives every bit of it. On a GPU a product and its
subtraction are rounded once, and a quotient to two units in the last place, so that a number beside the middle of two
codes may take the other.

Roofline: B^2 / 2 multiplications a column, 34 million for 128 x 4096, and 6 MB in and out: microseconds; what it takes
is one column's chain of 128 roundings. Measured 2026-11-22 on an H100 80GB HBM3 (jax 0.11.2), GridRounding, the call
from the host included: 128 x 4096 59 us, x 6144 57, x 28672 113 (16 rows held: 59, 54, 99, and six times as long to
lower); the float32 product that follows takes 183 us for 4096 rows of 4096 outputs. docs/solvers.md has whole solves.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float32, Int32, UInt8

from pallas_kernels import compat

COLUMNS: Final = 128  # of a block: its threads
MOST_ROWS: Final = 128  # of F [B, B] and c [B, 128] in shared memory


@dataclass(frozen=True)
class FeedbackConfig:
    """How the work is divided.

    Attributes:
      held: rows that a thread keeps in registers at once.
    """

    held: int = 8


class _Rounding(abc.ABC):
    """How one row is rounded; `given` are references to what it needs, in the GPU's memory."""

    @abc.abstractmethod
    def results(self) -> tuple[Any, ...]:
        """Returns the dtypes of what is kept of a row."""

    @abc.abstractmethod
    def __call__(self, values: Any, row: Any, columns: Any, diagonal: Any, given: Sequence[Any]) -> tuple[Any, ...]:
        """Returns what is kept of a row, and last what it changes."""


@final
@dataclass(frozen=True)
class GridRounding(_Rounding):
    """Rounding on uniform grids; given are each row's group, and the groups' scales and whole zeros."""

    bits: int

    def results(self) -> tuple[Any, ...]:
        """Returns the dtypes of codes and changes."""
        return jnp.uint8, jnp.float32

    def __call__(self, values: Any, row: Any, columns: Any, diagonal: Any, given: Sequence[Any]) -> tuple[Any, ...]:
        """Returns codes and changes."""
        groups, scales, zeros = given
        group = groups[row]
        scale, zero = _load(scales.at[group, columns]), _load(zeros.at[group, columns])
        codes = _clip(jnp.round(values / scale) + zero, 0.0, 2.0**self.bits - 1)
        return codes, (values - scale * (codes - zero)) / diagonal


@final
@dataclass(frozen=True)
class OutlierRounding(_Rounding):
    """Rounding on the grids of one group, with real zeros; given is what `round_with_outliers` takes."""

    bits: int
    dtype: Any

    def results(self) -> tuple[Any, ...]:
        """Returns the dtypes of codes, outliers, what stands for the weights, and changes."""
        return jnp.uint8, jnp.uint8, jnp.float32, jnp.float32

    def __call__(self, values: Any, row: Any, columns: Any, diagonal: Any, given: Sequence[Any]) -> tuple[Any, ...]:
        """Returns codes, outliers, what stands for the weights, and changes."""
        counts, limit, scales, zeros = given
        scale, zero = _load(scales.at[0, columns]), _load(zeros.at[0, columns])
        divisor = jnp.where(scale > 0.0, scale, 1.0)
        off = (values - self._nearest(values, scale, divisor, zero)[1]) * counts[row]
        outlier = off * off > limit[0]
        codes, rounded = self._nearest(jnp.where(outlier, 0.0, values), scale, divisor, zero)
        dense = jnp.where(outlier, values.astype(self.dtype).astype(jnp.float32), rounded)
        return codes, jnp.where(outlier, 1.0, 0.0), dense, (values - dense) / diagonal

    def _nearest(self, values: Any, scale: Any, divisor: Any, zero: Any) -> tuple[Any, Any]:
        codes = _clip(jnp.round(values / divisor + zero), 0.0, 2.0**self.bits - 1)
        return codes, scale * (codes - zero)


@final
@dataclass(frozen=True)
class StepRounding(_Rounding):
    """Rounding to whole numbers; given are the lowest and the highest, the last sweep's codes, and perhaps noise."""

    noisy: bool

    def results(self) -> tuple[Any, ...]:
        """Returns the dtype of codes."""
        return (jnp.float32,)

    def __call__(self, values: Any, row: Any, columns: Any, diagonal: Any, given: Sequence[Any]) -> tuple[Any, ...]:
        """Returns codes and changes."""
        ends, last, *noise = given
        values = values + _load(noise[0].at[row, columns]) if self.noisy else values
        rounded = jnp.round(values)
        if self.noisy:
            rounded = jnp.where(rounded > values, rounded - 1.0, rounded)  # Mosaic has no floor
        codes = _clip(rounded, ends[0], ends[1])
        return codes, codes - _load(last.at[row, columns])


def fault_of_block(rows: int) -> str | None:
    """Returns why no kernel rounds a block of so many rows; None where one does."""
    return f"blocks of {rows} rows, kernels take {MOST_ROWS}" if rows > MOST_ROWS else None


def round_on_grids(
    rows: Float32[Array, "rows out"],
    factor: Float32[Array, "rows rows"],
    groups: Int32[Array, "rows"],
    scales: Float32[Array, "groups out"],
    zeros: Float32[Array, "groups out"],
    *,
    bits: int,
    config: FeedbackConfig = FeedbackConfig(),
    simulate: compat.Simulation | None = None,
) -> tuple[UInt8[Array, "rows out"], Float32[Array, "rows out"]]:
    """Rounds the rows of a block as GPTQ does.

    Args:
      rows: the block as left by the blocks before.
      factor: its triangle of U, inv(H) = U^T U.
      groups: which grid each row has.
      scales: of the grids.
      zeros: of the grids, whole numbers.
      bits: of a code.
      config: how the work is divided.
      simulate: run in the interpreter on the CPU with these settings.

    Returns:
      Codes, and errors (w - q) / U_jj.

    Raises:
      ValueError: the block has too many rows.
    """
    codes, errors = _run(GridRounding(bits), rows, factor, (groups,), (scales, zeros), config, simulate)
    return codes, errors


def round_with_outliers(
    rows: Float32[Array, "rows out"],
    factor: Float32[Array, "rows rows"],
    counts: Float32[Array, "rows"],
    limit: Float32[Array, ""],
    scales: Float32[Array, "out"],
    zeros: Float32[Array, "out"],
    *,
    bits: int,
    dtype: Any,
    config: FeedbackConfig = FeedbackConfig(),
    simulate: compat.Simulation | None = None,
) -> tuple[UInt8[Array, "rows out"], UInt8[Array, "rows out"], Float32[Array, "rows out"], Float32[Array, "rows out"]]:
    """Rounds the rows of a group as SpQR does.

    Args:
      rows: the group as left by those before.
      factor: its triangle of U.
      counts: how much an error in each row counts.
      limit: the square of an error, times its count, from which on a weight is an outlier.
      scales: of each output's grid; where it is 0 the grid has the point 0 alone.
      zeros: of the grids, real numbers.
      bits: of a code.
      dtype: what outliers are stored in.
      config: how the work is divided.
      simulate: run in the interpreter on the CPU with these settings.

    Returns:
      Codes, where outliers are (1 or 0), what stands for the weights, and errors (w - q) / U_jj.

    Raises:
      ValueError: the group has too many rows.
    """
    grids = (scales[None], zeros[None])
    codes, told, dense, errors = _run(
        OutlierRounding(bits, dtype), rows, factor, (counts, limit[None]), grids, config, simulate
    )
    return codes, told, dense, errors


def round_to_steps(
    rows: Float32[Array, "rows out"],
    feedback: Float32[Array, "rows rows"],
    ends: Float32[Array, "2"],
    last: Float32[Array, "rows out"],
    noise: Float32[Array, "rows out"] | None,
    *,
    config: FeedbackConfig = FeedbackConfig(),
    simulate: compat.Simulation | None = None,
) -> Float32[Array, "rows out"]:
    """Rounds the rows of a block as one sweep of LDLQ, or of coordinate descent, does.

    Args:
      rows: what the block's rows would round now, in grid steps.
      feedback: F; what is not above its diagonal does not count.
      ends: the lowest and the highest code.
      last: codes before this sweep.
      noise: in [0, 1), in place of the half of rounding; None to round half to even.
      config: how the work is divided.
      simulate: run in the interpreter on the CPU with these settings.

    Returns:
      Codes.

    Raises:
      ValueError: the block has too many rows.
    """
    numbers = (last,) if noise is None else (last, noise)
    return _run(StepRounding(noise is not None), rows, feedback, (ends,), numbers, config, simulate)[0]


def _run(
    rounding: _Rounding,
    rows: jax.Array,
    factor: jax.Array,
    vectors: tuple[jax.Array, ...],
    numbers: tuple[jax.Array, ...],
    config: FeedbackConfig,
    simulate: compat.Simulation | None,
) -> tuple[Any, ...]:
    size, outputs = rows.shape
    fault = fault_of_block(size)
    if fault:
        raise ValueError(f"{fault}: cut it")
    held = min(config.held, size)
    more, width = -size % held, -outputs % COLUMNS  # rows without feedback, columns of their own

    def wide(array: jax.Array) -> jax.Array:
        below = more if array.shape[0] == size else 0
        return jnp.pad(array, ((0, below), (0, width)), constant_values=1) if below or width else array

    factor = jax.scipy.linalg.block_diag(factor, jnp.eye(more, dtype=factor.dtype)) if more else factor
    vectors = tuple(jnp.pad(each, (0, more)) if more and each.shape[0] == size else each for each in vectors)
    kernel = _Kernel(rounding, held, size + more)
    call = compat.kernel(
        kernel.body,
        out=tuple(jax.ShapeDtypeStruct((size + more, outputs + width), dtype) for dtype in rounding.results()),
        scratch=kernel.scratch(),
        grid={"block": (outputs + width) // COLUMNS},
        manual_barriers=True,  # a thread reads what it wrote itself, and F after its barrier
        simulate=simulate,
    )
    found = call(wide(rows), factor, *vectors, *map(wide, numbers))
    return tuple(each[:size, :outputs] for each in found) if more or width else tuple(found)


@dataclass(frozen=True)
class _Kernel:
    """One kernel's sizes and program; `_gmem` names what lies in the GPU's memory, `_smem` in a block's own."""

    rounding: _Rounding
    held: int
    rows: int

    def scratch(self) -> dict[str, Any]:
        """Returns the shared memory and barriers, by the names of the body's arguments."""
        return {
            "factor_smem": compat.SharedMemory((self.rows, self.rows), jnp.float32),
            "changes_smem": compat.SharedMemory((self.rows, COLUMNS), jnp.float32),
            "copied": compat.Barrier(num_arrivals=1),
        }

    def body(
        self, rows_gmem: Any, factor_gmem: Any, *others: Any, factor_smem: Any, changes_smem: Any, copied: Any
    ) -> None:
        """Rounds 128 columns of all rows."""
        count = len(self.rounding.results())
        given, results = others[:-count], others[-count:]
        columns = pl.ds(lax.axis_index("block") * COLUMNS, COLUMNS)
        compat.copy_in(factor_gmem, factor_smem, copied)
        compat.wait(copied)

        def part(index: Any, _: Any) -> Any:
            first = index * self.held

            def subtract(row: Any, held: tuple[Any, ...]) -> tuple[Any, ...]:
                change = _load(changes_smem.at[row])
                return tuple(each - factor_smem[row, first + i] * change for i, each in enumerate(held))

            loaded = tuple(_load(rows_gmem.at[first + i, columns]) for i in range(self.held))
            held = list(lax.fori_loop(0, first, subtract, loaded))
            for i in range(self.held):
                row = first + i
                *kept, change = self.rounding(held[i], row, columns, factor_smem[row, row], given)
                changes_smem.at[row][...] = change
                for result, numbers in zip(results, (*kept, change), strict=False):
                    result.at[row, columns][...] = numbers.astype(result.dtype)
                for later in range(i + 1, self.held):
                    held[later] = held[later] - factor_smem[row, first + later] * change
            return 0

        lax.fori_loop(0, self.rows // self.held, part, 0)


def _load(ref: Any) -> Any:
    return compat.load(ref, compat.line(COLUMNS))


def _clip(values: Any, low: Any, high: Any) -> Any:
    return jnp.minimum(jnp.maximum(values, low), high)
