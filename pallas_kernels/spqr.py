"""Products of a few tokens with SpQR's weights: 3-bit codes, groups of 16 under two-level grids, outliers; m <= 2.

    y[m, n] = sum_k x[m, k] * scales[k // 16, n] * (codes[n, k] - zeros[k // 16, n])
              + sum_j x[m, rows[n, j]] * values[n, j]
    scales, zeros = base[k // 16, n // 16] + step[k // 16, n // 16] * (a code of 3 or 4 bits)[k // 16, n]

Groups of 16 are one step of the tensor cores' bfloat16 instruction, so that scales could be multiplied into weights,
two and more instructions each, or want as many accumulators as there are groups. Here groups are columns: x is spread
over 8 columns for each token, column c keeping the inputs of each run's group c and zeros elsewhere,

        inputs of a run of 128: 16 | 16 | 16 | 16 | 16 | 16 | 16 | 16
    column 0                    x    0    0    0    0    0    0    0
    column 1                    0    x    0    0    0    0    0    0       (in registers: `inline_warp.group_products`)
    ..
    64 outputs: 3-bit words -> registers -> bfloat16 128 + code -> mma.sync -> float32 [64, 8]: each group's own sum,
    sums of x by group likewise, of ones;   sum += scales * (product - (128 + zeros) * sums of x), elementwise

and eight columns are added at the end. Grids are computed in registers from their codes (`inline.two_level_grids`): a
warp's 16 rows are the 16 outputs that share a grid. While the first copies are under way each thread gathers the x of
its share of a row's outliers and begins the row's sum with them (`inline.gathered`).

Roofline: 3 + 8 / 16 + 64 / 256 = 3.75 bits per weight over the memory's bandwidth, and 32 for each outlier. Measured
2026-11-23 on an H100 80GB HBM3 (jax 0.11.2, kernel time by CUPTI, median, weights beyond the cache, of which a copy
runs at 2940 GB/s; `python -m pallas_kernels.bench --kinds spqr3` measures anew), one token, 1 % of outliers, four
warpgroups; "before" are warpgroups' products, with two XLA kernels that spread and add x, in the same run:

    n x k            copies, splits     us       of a copy   XLA bfloat16    ratio    before
    8192 x 8192      3 of 256           22.9     51 %        47.9            2.09      25.6 us    issue 6 asks for 2.2
    7168 x 28672     2 of 512           57.2     62 %       140.4            2.45      63.9
    12288 x 49152    3 of 256, two     183.2     57 %       399.8            2.18     221.1       one split: 198.6

34.7 MB of 8192 x 8192 take 11.8 us at the speed of a copy; a step of 64 x 256 is some 480 instructions of a warp, a
third of the issue slots. They wait for one another, and for the outliers before. With 7 tokens a draft took 67.9 us,
twice as long as bfloat16: no more than 2 are taken.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16, Float16, Int, Int8, Integer

from pallas_kernels import compat, inline, inline_warp, meet
from pallas_kernels.decode_config import DecodeConfig
from pallas_kernels.fields import THREES

MOST_TOKENS: Final = 2
GROUP: Final = 16  # inputs that share a scale and a zero: one step of the instruction
PER_RUN: Final = THREES // GROUP  # groups of a run, and columns of a token
STORED: Final = THREES * 3 // 4  # int4 numbers of a run's words
RUNS: Final = 2  # loaded at once: their words are a multiple of 32 bytes
BIAS: Final = 128.0  # of unpacked codes


def fault_of_spqr(config: DecodeConfig, outputs: int, inputs: int) -> str | None:
    """Returns why SpQR's weights cannot be multiplied with this configuration; None where they can."""
    parts = config.splits * config.warpgroups
    if config.instruction != "warp":
        return "SpQR's x is spread in the registers of warps: their own instruction multiplies it"
    if config.depth % (RUNS * THREES) or inputs % (config.depth * parts):
        return f"{inputs} inputs are no multiple of {parts} ranges of {config.depth}, or those none of {RUNS * THREES}"
    if outputs % compat.ROWS_OF_ACCUMULATOR or config.rows != compat.ROWS_OF_ACCUMULATOR:
        return f"{outputs} outputs are no multiple of 64, or blocks of {config.rows} are not 64"
    return None


def spqr_decode(
    x: BFloat16[Array, "tokens in"],
    codes: Int[Array, "out stored"],
    grid_codes: Int8[Array, "out groups"],
    grids: Float16[Array, "tiles groups 16"],
    values: Float16[Array, "out slots"] | None = None,
    rows: Integer[Array, "out slots"] | None = None,
    *,
    config: DecodeConfig,
    simulate: compat.Simulation | None = None,
) -> BFloat16[Array, "tokens out"]:
    """Multiplies activations of at most 2 tokens by SpQR's weights.

    Args:
      x: activations.
      codes: int4 words in the order of `fields.store_threes`.
      grid_codes: a scale's code in the low four bits, a zero's in the high.
      grids: for each group and run of 16 outputs the scales' base and step and the zeros', of 64 outputs together.
      values: what is added to a weight in each slot of an output; None, and no rows, where there are no outliers.
      rows: the input of each slot.
      config: how the work is divided.
      simulate: run in the interpreter on the CPU with these settings.

    Raises:
      ValueError: the configuration does not fit the weight, or there are too many tokens.
    """
    (m, k), n, simulated = x.shape, len(codes), simulate is not None
    fault = fault_of_spqr(config, n, k)
    if m > MOST_TOKENS:
        fault = f"{m} tokens are more than {MOST_TOKENS}: dequantize for XLA, which is faster there"
    if (values is None) != (rows is None):
        fault = "outliers have values or rows alone: give both, or neither"
    if fault:
        raise ValueError(f"SpQR's weight [{n}, {k}] with {config}: {fault}")
    given = [codes, grid_codes, grids, x.reshape(m, -1, THREES)]
    if values is not None and rows is not None:
        if values.shape[1] % inline.SLOTS:
            raise ValueError(
                f"{values.shape[1]} slots of outliers are no multiple of {inline.SLOTS}: use `prepare_spqr`"
            )
        given += [values, rows, x]
    kernel = _Kernel(config, m, k, values is not None, meet.clustered(config, simulate), simulated)
    return meet.launch(kernel, given, m, n, kernel.scratch, simulate)[0]


@dataclass(frozen=True)
class _Kernel:
    """One kernel's sizes and program; `_gmem` names what lies in the GPU's memory, `_smem` in a block's own."""

    config: DecodeConfig
    tokens: int
    inputs: int
    outliers: bool
    clustered: bool
    simulated: bool

    @property
    def columns(self) -> int:
        return PER_RUN * self.tokens

    @property
    def by_step(self) -> bool:
        return True

    @property
    def steps(self) -> int:
        return self.inputs // (self.config.depth * self.config.splits * self.config.warpgroups)

    @property
    def stages(self) -> int:
        return min(self.config.stages, self.steps)

    def scratch(self, result: Any) -> dict[str, Any]:
        """Returns the shared memory and barriers, by the names of the body's arguments."""
        c, shared, rows = self.config, compat.SharedMemory, self.config.rows
        slots, groups = (c.warpgroups, self.stages), c.depth // GROUP
        words = compat.tiled(RUNS * STORED, jnp.int4)
        found = {
            "codes_smem": shared((*slots, rows, c.depth * STORED // THREES), jnp.int4, transforms=words),
            "grid_codes_smem": shared((*slots, rows, groups), jnp.int8),
            "grids_smem": shared((*slots, groups, GROUP), jnp.float16),
            "full": compat.Barrier(num_arrivals=4, num_barriers=c.warpgroups * self.stages),
            "x_smem": shared((*slots, self.tokens, c.depth // THREES, THREES), jnp.bfloat16),
            "out_smem": shared((self.tokens, rows), result),
        }
        return found | meet.scratch(rows, self.columns, c.warpgroups, c.splits if self.clustered else 1)

    def body(
        self, codes_gmem: Any, grid_codes_gmem: Any, grids_gmem: Any, x_gmem: Any, *rest: Any, **memory: Any
    ) -> None:
        """One warpgroup's program."""
        *outliers_gmem, out_gmem = rest
        c, rows = self.config, self.config.rows
        warpgroup, split, tile = lax.axis_index("wg"), lax.axis_index("split"), lax.axis_index("tile")
        first = (split * c.warpgroups + warpgroup) * self.steps
        outputs = pl.ds(tile * rows, rows)

        def fetch(step: Any, slot: Any) -> None:
            number, stored, groups = first + step, c.depth * STORED // THREES, c.depth // GROUP
            runs = pl.ds(number * (c.depth // THREES), c.depth // THREES)
            copies = [
                (codes_gmem.at[outputs, pl.ds(number * stored, stored)], "codes_smem"),
                (grid_codes_gmem.at[outputs, pl.ds(number * groups, groups)], "grid_codes_smem"),
                (grids_gmem.at[tile, pl.ds(number * groups, groups)], "grids_smem"),
                (x_gmem.at[:, runs], "x_smem"),
            ]
            for source, name in copies:
                compat.copy_in(source, memory[name].at[warpgroup, slot], full(slot))

        def full(slot: Any) -> Any:
            return memory["full"].at[warpgroup * self.stages + slot]

        def begun() -> Any:
            if not outliers_gmem:
                return compat.cast(jnp.zeros((rows, self.columns), jnp.float32), compat.C)
            values, places, plain_x = outliers_gmem
            sums = inline.gathered(
                values.at[outputs], places.at[outputs], plain_x, warpgroup, c.warpgroups, simulated=self.simulated
            )
            return sums * jnp.where(split == 0, jnp.float32(1), jnp.float32(0))  # their part belongs to one split

        sum_ = meet.walk(self, fetch, lambda sum_, slot: self._add(sum_, warpgroup, slot, memory), begun, full)

        def store(sum_: Any) -> None:
            target = memory["out_smem"]
            for token in range(self.tokens):
                value = jnp.sum(sum_[:, PER_RUN * token : PER_RUN * (token + 1)], axis=1)
                target[token] = value.astype(target.dtype)
            compat.commit()
            compat.copy_out(target, out_gmem.at[0 if self.clustered else split, :, outputs])

        def across_splits(sum_: Any) -> None:
            meet.across_cluster(sum_, split, c.splits if self.clustered else 1, memory, store)

        meet.across_warpgroups(sum_, warpgroup, c.warpgroups, memory, across_splits)
        compat.wait_out(0, wait_read_only=True)  # shared memory may go; the end of the kernel waits for the rest

    def _add(self, sum_: Any, warpgroup: Any, slot: Any, memory: dict[str, Any]) -> Any:
        """Returns the sum and the product of one copy, run by run."""

        def of_slot(name: str) -> Any:
            return memory[name].at[warpgroup, slot]

        grids = inline.two_level_grids(of_slot("grid_codes_smem"), of_slot("grids_smem"), simulated=self.simulated)
        for run, operand in enumerate(self._operands(of_slot("codes_smem"))):
            x = of_slot("x_smem").at[:, run]
            biased, sums = inline_warp.group_products(operand, x, simulated=self.simulated)
            scales, zeros = (grid[:, run * PER_RUN : (run + 1) * PER_RUN] for grid in grids)
            if self.tokens > 1:
                scales, zeros = (jnp.concatenate([grid] * self.tokens, axis=1) for grid in (scales, zeros))
            sum_ = sum_ + scales * (biased - (zeros + jnp.float32(BIAS)) * sums)
        return sum_

    def _operands(self, codes_smem: Any) -> Iterator[Any]:
        """Yields the runs of one copy, unpacked."""
        packed: Any = None
        for run in range(self.config.depth // THREES):
            if run % RUNS == 0:
                words = codes_smem.at[:, pl.ds(run * STORED, RUNS * STORED)]
                packed = inline.load_packed(words, simulated=self.simulated)
            at = run % RUNS * STORED
            yield inline.unpack_threes(packed[:, at : at + STORED], simulated=self.simulated)
