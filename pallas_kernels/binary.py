"""Products of a few tokens with binary codes, the format of BCQ and LUT-GEMM: 2 to 4 planes of signs, m <= 8.

    y[m, n] = sum_k x[m, k] * (offsets[k // g, n] + sum_p alphas[k // g, p, n] * b_p[n, k]),    b_p = -1 or +1

With c_p = (b_p + 1) / 2, 0 or 1, and a group's own grid for x, x = step * (256 high + low) of which high and low are
int8, a group's part is

    sum_p 2 alpha_p * step * sum_k c_p * (256 high + low)  +  (offset - sum_p alpha_p) * sum_k x

whose inner sums are products of integers, exact. The step is a power of two, 2^-14 to 2^-13 of the group's largest
number: numbers down to 2^-6 of that are exact, smaller ones rounded to a step. `pieces` makes them before the kernel.
A masked sign is an int8 operand with no further work (`fields`): it costs a quarter of an instruction, where expansion
to bfloat16 would cost two, or a table lookup in shared memory.

            inputs                                            4 or 3 planes of signs, one load
            warpgroup 0     warpgroup 1     ..                -> registers & 1, 2, 4, 8 -> int8 operands
    64    | depth | depth | depth | depth |                   -> wgmma with the pieces, 2 columns for each token,
    outputs                                                      one int32 accumulator [64, 8] for each plane
                                                              -> float32, times alphas and steps -> sum

Sums of warpgroups and splits meet as in decode.py (`meet`), then the two columns of each token: the same inputs give
the same bits.

Roofline: bytes of signs and alphas, n * k * bits * (1 / 8 + 2 / g), over the memory's bandwidth; 4 bits in groups of
128 are 4.5 bits per weight, and 3.2 instructions per weight of a thread: half of the issue slots at 75 % of a copy.
Measured (jax 0.11.2, kernel time by CUPTI of all kernels of a call, median, weights beyond the cache;
`python -m pallas_kernels.bench --kinds binary4 binary3` measures anew), one token, groups of 128; on an H100 80GB HBM3
2026-11-23, a kernel making the pieces and warps multiplying three planes (a copy runs at 2940 GB/s), on an H200 the
day before, with three XLA kernels and warpgroups' products (3360), when a group's step was its largest number / 32512:

                     H100    XLA bfloat16    ratio            H200    ratio    LUT-GEMM's own table
    7168 x 28672     48.1 us    140.4 us      2.92, 4 bits     47.4    2.05     2.1
    8192 x 32768     61.5       180.5         2.93             53.7    2.33
    12288 x 49152   133.4       402.2         3.01            121.7    2.24
    7168 x 28672     43.1       140.4         3.26, 3 bits     41.2    2.36     2.58
    8192 x 32768     51.3       180.5         3.52             46.4    2.70
    12288 x 49152   110.5       399.8         3.62            104.4    2.61

7168 outputs are 112 tiles, on 132 multiprocessors; 12288 are 192, which two blocks a tile share, in a cluster. The
H200's faster memory helps bfloat16 alone: here instructions are felt, of the tensor cores one for each plane, 64
outputs and 32 inputs, every 23 cycles of a multiprocessor by warpgroups.
"""

from dataclasses import dataclass
from typing import Any, Final

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16, Float16, Int

from pallas_kernels import compat, inline, inline_warp, meet
from pallas_kernels.decode_config import DecodeConfig
from pallas_kernels.fields import BLOCK, BLOCKS
from pallas_kernels.pieces import COLUMNS, PIECES, pieces_by_kernel, pieces_by_xla

MOST_TOKENS: Final = 8
LEAST_GROUP: Final = 64  # inputs: int8 operands in registers want rows of 64 bytes in shared memory
UNITS: Final = {2: 128, 3: 256, 4: 64}  # inputs whose words are 32 bytes or a multiple of it


def fault_of_binary(config: DecodeConfig, bits: int, outputs: int, inputs: int, groups: int) -> str | None:
    """Returns why binary codes cannot be multiplied with this configuration; None where they can."""
    group, parts, unit = inputs // groups, config.splits * config.warpgroups, UNITS.get(bits, 0)
    if not unit:
        return f"{bits} planes of signs are none of {tuple(UNITS)}"
    if group < LEAST_GROUP or inputs % group or (group % unit and unit % group):
        return f"groups of {group} inputs are below {LEAST_GROUP}, or they and {unit} do not divide one another"
    if config.depth % max(group, unit) or inputs % (config.depth * parts):
        return (
            f"{inputs} inputs are no multiple of {parts} ranges of {config.depth}, or those none of groups of {group}"
        )
    if outputs % compat.ROWS_OF_ACCUMULATOR or config.rows != compat.ROWS_OF_ACCUMULATOR:
        return f"{outputs} outputs are no multiple of 64, or blocks of {config.rows} are not 64"
    return None


def binary_decode(
    x: BFloat16[Array, "tokens in"],
    signs: Int[Array, "out stored"],
    alphas: Float16[Array, "groups bits out"],
    offsets: Float16[Array, "groups out"] | None = None,
    *,
    config: DecodeConfig,
    simulate: compat.Simulation | None = None,
) -> BFloat16[Array, "tokens out"]:
    """Multiplies activations of at most 8 tokens by binary codes.

    Args:
      x: activations.
      signs: int4 words in the order of `fields.store_signs`.
      alphas: plane p's times 2^(bits - 1 - p), as `prepare_binary` keeps them.
      offsets: what is added to a group's weights; None for nothing.
      config: how the work is divided.
      simulate: run in the interpreter on the CPU with these settings.

    Raises:
      ValueError: the configuration does not fit the weight, or there are too many tokens.
    """
    (m, k), n, (groups, bits, _), simulated = x.shape, len(signs), alphas.shape, simulate is not None
    fault = fault_of_binary(config, bits, n, k, groups)
    if m > MOST_TOKENS:
        fault = f"{m} tokens are more than {MOST_TOKENS}: dequantize for XLA"
    if fault:
        raise ValueError(f"binary codes [{n}, {k}] with {config}: {fault}")
    columns = compat.columns_of(PIECES * m, integer=True)
    if config.pieces == "by kernel":
        pieces, grids = pieces_by_kernel(x, k // groups, bits, simulate)
    else:
        pieces, grids = pieces_by_xla(x, k // groups, bits)
    if simulated or PIECES * m > compat.LEAST_COLUMNS:  # fewer columns lie outside, and copies fill them
        pieces = jnp.pad(pieces, ((0, columns - PIECES * m), (0, 0)))
    kernel = _Kernel(
        config=config,
        bits=bits,
        tokens=m,
        columns=columns,
        inputs=k,
        group=k // groups,
        offsets=offsets is not None,
        clustered=meet.clustered(config, simulate),
        simulated=simulated,
    )
    given = [pieces, signs, alphas, grids, *([] if offsets is None else [offsets])]
    return meet.launch(kernel, given, m, n, kernel.scratch, simulate)[0]


@dataclass(frozen=True)
class _Kernel:
    """One kernel's sizes and program; `_gmem` names what lies in the GPU's memory, `_smem` in a block's own."""

    config: DecodeConfig
    bits: int
    tokens: int
    columns: int
    inputs: int
    group: int
    offsets: bool
    clustered: bool
    simulated: bool

    @property
    def by_step(self) -> bool:
        return True

    @property
    def steps(self) -> int:
        return self.inputs // (self.config.depth * self.config.splits * self.config.warpgroups)

    @property
    def stages(self) -> int:
        return min(self.config.stages, self.steps)

    @property
    def unit(self) -> int:
        """Inputs whose words are loaded at once."""
        return max(UNITS[self.bits], self.group)

    def stored(self, inputs: int) -> int:
        """Returns how many int4 numbers hold the signs of so many inputs."""
        return inputs * self.bits // 4

    def scratch(self, result: Any) -> dict[str, Any]:
        """Returns the shared memory and barriers, by the names of the body's arguments."""
        c, shared, rows = self.config, compat.SharedMemory, self.config.rows
        slots, groups = (c.warpgroups, self.stages), c.depth // self.group
        words = compat.tiled(self.stored(self.unit), jnp.int4)
        found = {
            "x_smem": shared(
                (*slots, self.columns, c.depth), jnp.int8, transforms=compat.tiled(min(self.group, 128), jnp.int8)
            ),
            "signs_smem": shared((*slots, rows, self.stored(c.depth)), jnp.int4, transforms=words),
            "alphas_smem": shared((*slots, groups, self.bits, rows), jnp.float16),
            "grids_smem": shared((*slots, groups, 2, COLUMNS), jnp.float32),
            "full": compat.Barrier(num_arrivals=4 + self.offsets, num_barriers=c.warpgroups * self.stages),
            "turned_smem": shared((self.columns, rows), jnp.float32),
            "out_smem": shared((self.tokens, rows), result),
        }
        if self.offsets:
            found["offsets_smem"] = shared((*slots, groups, rows), jnp.float16)
        if self.simulated:
            found["bounce"] = shared((c.warpgroups, rows, self.group), jnp.int8)
        return found | meet.scratch(rows, self.columns, c.warpgroups, c.splits if self.clustered else 1)

    def body(self, x_gmem: Any, signs_gmem: Any, alphas_gmem: Any, grids_gmem: Any, *rest: Any, **memory: Any) -> None:
        """One warpgroup's program."""
        *optional, out_gmem = rest
        c, rows = self.config, self.config.rows
        warpgroup, split, tile = lax.axis_index("wg"), lax.axis_index("split"), lax.axis_index("tile")
        first = (split * c.warpgroups + warpgroup) * self.steps
        outputs = pl.ds(tile * rows, rows)

        def fetch(step: Any, slot: Any) -> None:
            start, stored = (first + step) * c.depth, self.stored(c.depth)
            inputs, groups = pl.ds(start, c.depth), pl.ds(start // self.group, c.depth // self.group)
            copies = [
                (signs_gmem.at[outputs, pl.ds((first + step) * stored, stored)], "signs_smem"),
                (x_gmem.at[pl.ds(0, self.columns), inputs], "x_smem"),
                (alphas_gmem.at[groups, :, outputs], "alphas_smem"),
                (grids_gmem.at[groups], "grids_smem"),
                *((offsets.at[groups, outputs], "offsets_smem") for offsets in optional),
            ]
            for source, name in copies:
                compat.copy_in(source, memory[name].at[warpgroup, slot], full(slot))

        def full(slot: Any) -> Any:
            return memory["full"].at[warpgroup * self.stages + slot]

        def nothing() -> Any:
            return compat.cast(jnp.zeros((rows, self.columns), jnp.float32), compat.C)

        sum_ = meet.walk(self, fetch, lambda sum_, slot: self._add(sum_, warpgroup, slot, memory), nothing, full)

        def store(sum_: Any) -> None:
            turned, target = memory["turned_smem"], memory["out_smem"]
            turned.T[...] = compat.cast(sum_, compat.C_TRANSPOSED)
            compat.commit()
            for token in range(self.tokens):
                high, low = (
                    compat.load(turned.at[PIECES * token + piece], compat.ROWS, checked=False)
                    for piece in range(PIECES)
                )
                target[token] = (high + low).astype(target.dtype)
            compat.commit()
            compat.copy_out(target, out_gmem.at[0 if self.clustered else split, :, outputs])

        def across_splits(sum_: Any) -> None:
            meet.across_cluster(sum_, split, c.splits if self.clustered else 1, memory, store)

        meet.across_warpgroups(sum_, warpgroup, c.warpgroups, memory, across_splits)
        compat.wait_out(0, wait_read_only=True)  # shared memory may go; the end of the kernel waits for the rest

    def _add(self, sum_: Any, warpgroup: Any, slot: Any, memory: dict[str, Any]) -> Any:
        """Returns the sum and the product of one copy, group by group."""
        c, rows, bits, group = self.config, self.config.rows, self.bits, self.group
        bounce = memory["bounce"].at[warpgroup] if self.simulated else None

        def of_slot(name: str) -> Any:
            return memory[name].at[warpgroup, slot]

        packed: Any = None
        signs: Any = None
        span = max(group, BLOCK * BLOCKS[bits])  # whole runs of words
        for index in range(c.depth // group):
            start = index * group
            if start % self.unit == 0:
                words = of_slot("signs_smem").at[:, pl.ds(self.stored(start), self.stored(self.unit))]
                packed = inline.load_packed(words, simulated=self.simulated)
            if start % span == 0:
                at = self.stored(start % self.unit)
                signs = inline.unpack_signs(packed[:, at : at + self.stored(span)], bits, simulated=self.simulated)
            b = of_slot("x_smem").at[:, pl.ds(start, group)].T
            steps, sums = (
                compat.load(of_slot("grids_smem").at[index, i, pl.ds(0, self.columns)], compat.COLUMNS)
                for i in range(2)
            )
            alphas = [
                compat.load(of_slot("alphas_smem").at[index, plane], compat.ROWS).astype(jnp.float32)
                for plane in range(bits)
            ]

            def products(*accumulators: Any, signs: Any = signs, first: int = start % span, b: Any = b) -> Any:
                for plane, accumulator in enumerate(accumulators):
                    at = plane * span + first
                    compat.multiply(accumulator, signs[:, at : at + group], b, bounce)
                    if bits == 4 or self.simulated:  # or the planes' operands do not fit into 128 registers
                        compat.finish(0)
                return [accumulator[...] for accumulator in accumulators]

            if c.instruction == "warp":
                columns = inline_warp.load_columns(b, simulated=self.simulated)
                starts = [plane * span + start % span for plane in range(bits)]
                operands = [signs[:, at : at + group] for at in starts]
                found = [inline_warp.product(each, columns, simulated=self.simulated) for each in operands]
            else:
                planes = [compat.Accumulator((rows, self.columns), jnp.int32) for _ in range(bits)]
                found = compat.in_scope(products, *planes)
            terms = [
                values.astype(jnp.float32) * compat.along_rows(alpha, values.shape)
                for values, alpha in zip(found, alphas, strict=True)
            ]
            centers = [alpha * jnp.float32(-(2.0 ** (plane + 1 - bits))) for plane, alpha in enumerate(alphas)]
            part, base = sum(terms[1:], terms[0]), sum(centers[1:], centers[0])
            if self.offsets:
                base = base + compat.load(of_slot("offsets_smem").at[index], compat.ROWS).astype(jnp.float32)
            sum_ = sum_ + part * compat.along_columns(steps, sum_.shape)
            sum_ = sum_ + compat.along_rows(base, sum_.shape) * compat.along_columns(sums, sum_.shape)
        return sum_
