"""Matrix products of a few tokens with int4 weights, bound by the memory: W4A16 and W4A8, m <= 64.

    y[m, n] = sum_k x[m, k] * scales[k // g, n] * (codes[n, k] - zeros[k // g, n])                         W4A16
    y[m, n] = token_scales[m] * (sum_k x[m, k] * scales[k // g, n] * codes[n, k] - token_zeros[m] * sums[n])    W4A8

The weight is operand A of the tensor cores' instruction, 64 outputs by `depth` inputs, and x.T is operand B, so that m
is padded to 8 only. A block makes 64 or 128 outputs; its warpgroups, and `splits` blocks, share the inputs:

            inputs, contiguous in memory
            warpgroup 0       warpgroup 1        ..      each walks its own range, `stages` copies ahead
    64    | depth | depth |..| depth | depth |..|
    outputs: int4 -> registers -> bfloat16 or int8 -> wgmma -> float32 [64, m], times the group's scales -> sum
    then sums of warpgroups meet in shared memory, sums of splits in the first block of a cluster (or in XLA, where
    `cluster` is off), and are stored transposed, [m, out].

No order of additions depends on time: the same inputs give the same bits.

Roofline: int4 bytes and scales, n * k * (1/2 + 2 / g), over the memory's bandwidth. Measured 2026-11-23, on an H100
80GB HBM3 (jax 0.11.2, kernel time by CUPTI, median, weights beyond the cache; a copy of 512 MiB runs at 2940 GB/s;
`python -m pallas_kernels.bench` measures anew; all that was tried in
benchmarks/results/2026-11-23-h100-kernel-variants.jsonl), groups of 128, by warps' instruction;
"by warpgroups" is the best of those, of the same day or the one before:

    m    n x k           copies, warpgroups, splits       us     of a copy   XLA bfloat16    ratio    by warpgroups
    1    8192 x 8192     2 of 512, 2                     14.6    78 %         49.4           3.40      15.3 us
    16   8192 x 8192     likewise                        15.5    74 %         53.2           3.44      15.7
    1    8192 x 28672    likewise                        44.2    90 %        158.8           3.59      48.7
    1    28672 x 8192    likewise                        46.7    86 %        158.0           3.39      46.8
    1    14336 x 4096    2 of 512, 1                     13.3    75 %         41.0           3.08      15.0
    1    4096 x 14336    2 of 512, 2, a cluster of 2     13.8    72 %         42.1           3.04      14.4
    1    4096 x 4096     4 of 256, 2, a cluster of 2      6.2    46 %         14.6           2.36       6.3
    1    8192 x 8192     W4A8, 2 of 512, 2               13.0    88 %         48.2           3.70      13.7
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16, Float, Float32, Int, Int8

from pallas_kernels import compat, gate, inline, inline_warp, meet, residual
from pallas_kernels.decode_config import LEAST_PIECE, MOST_TOKENS, PADDED, DecodeConfig
from pallas_kernels.weights import Scales

OF_GROUPS: Final = ("scales", "centers")
OF_TOKENS: Final = ("token_scales", "token_zeros")  # arguments that only products of integers have
SIXTEENTH: Final = 1 / 16  # int4 codes are unpacked as 16 times themselves


def w4a16_decode(
    x: BFloat16[Array, "tokens in"],
    codes: Int[Array, "out in"],
    scales: Scales,
    centers: BFloat16[Array, "groups out"] | None = None,
    *,
    squares: Float32[Array, "runs columns"] | None = None,
    eps: float = 0.0,
    gated: bool = False,
    config: DecodeConfig,
    simulate: compat.Simulation | None = None,
) -> BFloat16[Array, "tokens made"]:
    """Multiplies bfloat16 activations of at most 64 tokens by an int4 weight.

    Args:
      x: activations.
      codes: int4 in the order of `order.stored_bf16`.
      scales: the groups' steps; one group is "per channel".
      centers: 136 + zeros; None where all zeros are 0.
      squares: of x's features before a norm, where x is `residual.Undivided`; None where it is divided.
      eps: of that norm.
      gated: return `gate.gated` of the product, half as many numbers; blocks then have 128 rows.
      config: how the work is divided.
      simulate: run in the interpreter on the CPU with these settings.

    Raises:
      ValueError: the configuration does not fit the weight, or there are too many tokens.
    """
    ends = residual.Ends(x.shape[1], None if squares is None else eps, gated=gated)
    return _run((x, codes, scales), {"centers": centers, "squares": squares}, ends, config, simulate)[0]


def w4a16_onto(
    x: BFloat16[Array, "tokens in"],
    codes: Int[Array, "out in"],
    scales: Scales,
    centers: BFloat16[Array, "groups out"] | None,
    stream: Float32[Array, "tokens out"],
    scale: BFloat16[Array, "out"],
    *,
    config: DecodeConfig,
    simulate: compat.Simulation | None = None,
) -> tuple[Float32[Array, "tokens out"], residual.Undivided]:
    """Adds the product of `w4a16_decode`, not rounded, to the residual stream, and begins the norm of the sum.

    Args:
      x: activations.
      codes: as of `w4a16_decode`.
      scales: likewise.
      centers: likewise.
      stream: what is added to.
      scale: of the norm of the sum.
      config: how the work is divided: splits meet in a cluster, if there are any.
      simulate: run in the interpreter on the CPU with these settings.

    Returns:
      The sum, and its norm but for the division.

    Raises:
      ValueError: the configuration does not fit the weight, or there are too many tokens.
    """
    ends, beside = residual.Ends(x.shape[1], onto=True), {"centers": centers, "stream": stream, "scale": scale}
    numbers, sums, squares = _run((x, codes, scales), beside, ends, config, simulate)
    return sums, residual.Undivided(numbers, squares)


def w4a8_decode(
    x: Int8[Array, "tokens in"],
    token_scales: Float32[Array, "tokens"],
    token_zeros: Float32[Array, "tokens"] | None,
    codes: Int[Array, "out in"],
    scales: Float[Array, "groups out"],
    sums: Float32[Array, "out"] | None = None,
    *,
    config: DecodeConfig,
    simulate: compat.Simulation | None = None,
) -> BFloat16[Array, "tokens out"]:
    """Multiplies int8 activations of at most 64 tokens by an int4 weight, the sums of a group exact in int32.

    Args:
      x: codes of the activations; 4-bit codes are int8 too.
      token_scales: the step of each token's grid.
      token_zeros: the code that stands for 0, for each token; None where all are 0.
      codes: int4 in the order of `order.stored_int8`.
      scales: the groups' steps; one group is "per channel".
      sums: the weight's sums over its inputs, wanted where `token_zeros` are given.
      config: how the work is divided.
      simulate: run in the interpreter on the CPU with these settings.

    Raises:
      ValueError: the configuration does not fit the weight, or there are too many tokens, or `sums` are wanting.
    """
    if token_zeros is not None and sums is None:
        raise ValueError("tokens have zeros but the weight no sums: give what prepare_w4a8 returns")
    group = x.shape[1] // scales.shape[0]
    if group < LEAST_PIECE:
        raise ValueError(f"groups of {group} inputs: int8 products want at least {LEAST_PIECE}; use W4A16")
    of_tokens = {"token_scales": token_scales, "token_zeros": token_zeros}
    beside = {"sums": None if token_zeros is None else sums} | of_tokens
    return _run((x, codes, scales), beside, residual.Ends(x.shape[1]), config, simulate)[0]


def _run(
    operands: tuple[jax.Array, jax.Array, jax.Array],
    beside: dict[str, jax.Array | None],
    ends: residual.Ends,
    config: DecodeConfig,
    simulate: compat.Simulation | None,
) -> tuple[jax.Array, ...]:
    """Runs the kernel on x, codes, scales and others by name; returns the product and what is made beside."""
    (x, codes, scales), simulated = operands, simulate is not None
    (m, k), n = x.shape, codes.shape[0]
    clustered = meet.clustered(config, simulate)
    fault = config.fault(n, k, scales.shape[0]) or ends.fault(config.splits, config.rows, clustered=clustered)
    if m > MOST_TOKENS:
        fault = f"{m} tokens are more than {MOST_TOKENS}: use the kernels of prefill.py"
    if fault:
        raise ValueError(f"decode of a weight [{n}, {k}] with {config}: {fault}")
    given = {name: array for name, array in beside.items() if array is not None}
    columns = compat.columns_of(m, integer="token_scales" in given)
    copied = 32 * compat.whole_tiles(m, 32)  # of the tokens' scales: a copy moves a multiple of 128 bytes
    stored = columns if m > PADDED or simulated else m  # fewer than 8 lie outside the array, which copies fill and drop
    x = meet.pad_rows(x, stored)
    if "stream" in given:
        given["stream"] = meet.pad_rows(given["stream"], stored)
    if simulated:
        given |= {name: jnp.pad(given[name], (0, copied - m)) for name in OF_TOKENS if name in given}
    group, names = k // scales.shape[0], tuple(given)
    kernel = _Kernel(config, columns, k, group, copied, names, ends, clustered=clustered, simulated=simulated)
    scratch = functools.partial(kernel.scratch, x.dtype, scales.dtype)
    made, reduction = ends.made(stored, n, config.rows, columns), ends.reduction_bytes()
    named = {"x": x, "codes": codes, "scales": scales, **given}
    arrays = [ends.parted(array) if name in OF_GROUPS else array for name, array in named.items()]
    y, *others = meet.launch(kernel, arrays, stored, n, scratch, simulate, made, reduction, ends.halves)
    return tuple(each[:m] if each.shape[0] == stored != m else each for each in (y, *others))


@dataclass(frozen=True)
class _Kernel:
    """One kernel's sizes and program; `_gmem` names what lies in the GPU's memory, `_smem` in a block's own.

    `names` are of the arguments behind x, codes and scales.
    """

    config: DecodeConfig
    columns: int
    inputs: int
    group: int
    copied: int
    names: tuple[str, ...]
    ends: residual.Ends
    clustered: bool
    simulated: bool

    @property
    def of_tokens(self) -> list[str]:
        return [name for name in OF_TOKENS if name in self.names]

    @property
    def by_step(self) -> bool:
        return self.config.barriers == "by step"

    @property
    def steps(self) -> int:
        return self.inputs // (self.config.depth * self.config.splits * self.config.warpgroups)

    @property
    def stages(self) -> int:
        return min(self.config.stages, self.steps)

    @property
    def chunk(self) -> int:
        """Inputs of one copy that share their scales."""
        return min(self.config.depth, self.group)

    @property
    def piece(self) -> int:
        """Inputs that are unpacked at once: the least that shared memory can swizzle is 64 codes."""
        return max(self.chunk, LEAST_PIECE)

    def scratch(self, operand: Any, steps_of_grid: Any, result: Any) -> dict[str, Any]:
        """Returns the shared memory and barriers, by the names of the body's arguments."""
        c, shared, rows = self.config, compat.SharedMemory, self.config.rows
        slots, float32 = (c.warpgroups, self.stages), jnp.float32
        grids = (*slots, c.depth // self.chunk, *self.ends.parts(rows))
        arrivals = 2 + self.ends.halves + ("centers" in self.names)
        inner, swizzled = compat.tiled(self.chunk, operand), 64 if result == jnp.bfloat16 else 32
        found = {
            "x_smem": shared((*slots, self.columns, c.depth), operand, transforms=inner),
            "codes_smem": shared((*slots, rows, c.depth), jnp.int4, transforms=compat.tiled(self.piece, jnp.int4)),
            "scales_smem": shared(grids, steps_of_grid),
            "full": compat.Barrier(num_arrivals=arrivals, num_barriers=c.warpgroups * self.stages),
            "out_smem": shared(
                (self.columns, self.ends.stored(rows)), result, transforms=compat.tiled(swizzled, result)
            ),
        }
        if "centers" in self.names:
            found["centers_smem"] = shared(grids, jnp.bfloat16)
        if self.of_tokens:
            found["tokens_smem"] = shared((len(self.of_tokens), self.copied), float32)
            found["told"] = compat.Barrier(num_arrivals=len(self.of_tokens))
        if self.simulated:
            found["bounce"] = shared((c.warpgroups, rows, self.chunk), operand)
        found |= self.ends.scratch(rows, self.columns)
        return found | meet.scratch(rows, self.columns, c.warpgroups, c.splits if self.clustered else 1)

    def body(self, x_gmem: Any, codes_gmem: Any, scales_gmem: Any, *rest: Any, **memory: Any) -> None:
        """One warpgroup's program."""
        gmem = dict(zip((*self.names, "out", "sum", "squares of sum"), rest, strict=False))
        c, m, rows = self.config, self.columns, self.config.rows
        warpgroup, split, tile = lax.axis_index("wg"), lax.axis_index("split"), lax.axis_index("tile")
        first = (split * c.warpgroups + warpgroup) * self.steps
        stored, tiles = self.ends.stored(rows), codes_gmem.shape[0] // rows
        outputs = pl.ds(tile * stored, stored)
        of_grids = *(slice(None) for _ in self.ends.parts(rows)[1:]), outputs
        loaded: dict[str, Any] = {}
        stores = (warpgroup == 0) & (split == 0) if self.clustered else warpgroup == 0

        def fetch(step: Any, slot: Any) -> None:
            barrier, start = full(slot), (first + step) * c.depth
            inputs, groups = pl.ds(start, c.depth), pl.ds(start // self.group, c.depth // self.chunk)
            for half in range(self.ends.halves):
                target = memory["codes_smem"].at[warpgroup, slot, pl.ds(half * stored, stored)]
                compat.copy_in(codes_gmem.at[pl.ds((half * tiles + tile) * stored, stored), inputs], target, barrier)
            compat.copy_in(x_gmem.at[pl.ds(0, m), inputs], memory["x_smem"].at[warpgroup, slot], barrier)
            compat.copy_in(scales_gmem.at[groups, *of_grids], memory["scales_smem"].at[warpgroup, slot], barrier)
            if "centers" in gmem:
                compat.copy_in(
                    gmem["centers"].at[groups, *of_grids], memory["centers_smem"].at[warpgroup, slot], barrier
                )

        def full(slot: Any) -> Any:
            return memory["full"].at[warpgroup * self.stages + slot]

        def begun() -> Any:
            loaded.update(self.ends.load(gmem, outputs))
            if self.of_tokens or self.ends.onto:

                @pl.when(stores)
                def _() -> None:
                    self.ends.fetch(gmem, memory, outputs)
                    for index, name in enumerate(self.of_tokens):
                        target = memory["tokens_smem"].at[index]
                        compat.copy_in(gmem[name].at[pl.ds(0, self.copied)], target, memory["told"])

            return compat.cast(jnp.zeros((rows, m), jnp.float32), compat.C)

        sum_ = meet.walk(self, fetch, lambda sum_, slot: self._add(sum_, warpgroup, slot, memory), begun, full)

        def store(sum_: Any) -> None:
            if self.of_tokens:
                compat.wait(memory["told"])
            row_sums = None
            if "sums" in gmem:  # the zeros' part belongs to one split
                row_sums = compat.load(gmem["sums"].at[outputs], compat.ROWS, checked=False)
                row_sums = row_sums * jnp.where(split == 0, jnp.float32(1), jnp.float32(0))
            value = total = self.ends.finished(self._scaled(sum_, row_sums, memory), loaded)
            if self.ends.onto:
                total = self.ends.summed(value, memory)
                value = total * compat.along_rows(loaded["scale"].astype(jnp.float32), total.shape)
            target = memory["out_smem"]
            target.T[...] = compat.cast(value.astype(target.dtype), compat.C_TRANSPOSED)
            compat.commit()
            compat.copy_out(target, gmem["out"].at[0 if self.clustered else split, pl.ds(0, m), outputs])
            if self.ends.onto:
                self.ends.store(total, gmem, memory, outputs, tile)

        def across_splits(sum_: Any) -> None:
            meet.across_cluster(sum_, split, c.splits if self.clustered else 1, memory, store)

        meet.across_warpgroups(sum_, warpgroup, c.warpgroups, memory, across_splits)
        compat.wait_out(0, wait_read_only=True)  # shared memory may go; the end of the kernel waits for the rest

    def _add(self, sum_: Any, warpgroup: Any, slot: Any, memory: dict[str, Any]) -> Any:
        """Returns the sum and the product of one copy, group by group, `together` of them under way at once."""
        c, rows, chunk = self.config, self.config.rows, self.chunk
        bounce = memory["bounce"].at[warpgroup] if self.simulated else None
        count, result = c.depth // chunk, jnp.int32 if self.of_tokens else jnp.float32
        operands = self._operands(warpgroup, slot, memory)
        if c.instruction == "warp":
            for group in range(count):
                columns = memory["x_smem"].at[warpgroup, slot, :, pl.ds(group * chunk, chunk)].T
                b = inline_warp.load_columns(columns, simulated=self.simulated)
                part = inline_warp.product(next(operands), b, simulated=self.simulated)
                scales = gate.load_rows(memory["scales_smem"].at[warpgroup, slot, group])
                sum_ = sum_ + part.astype(jnp.float32) * compat.along_rows(scales.astype(jnp.float32), part.shape)
            return sum_
        for first in range(0, count, c.together):
            members = range(first, min(first + c.together, count))
            ready = operands  # each is unpacked when the product before it is under way, but for halves of a piece
            if chunk < self.piece:
                ready = iter([next(operands) for _ in members])

            def products(*accumulators: Any, members: Any = members, ready: Any = ready) -> Any:
                for group, accumulator in zip(members, accumulators, strict=True):
                    b = memory["x_smem"].at[warpgroup, slot, :, pl.ds(group * chunk, chunk)].T
                    compat.multiply(accumulator, next(ready), b, bounce)
                    if self.simulated:
                        compat.finish(0)
                return [accumulator[...] for accumulator in accumulators]

            parts = compat.in_scope(products, *(compat.Accumulator((rows, self.columns), result) for _ in members))
            for group, part in zip(members, parts, strict=True):
                scales = gate.load_rows(memory["scales_smem"].at[warpgroup, slot, group])
                sum_ = sum_ + part.astype(jnp.float32) * compat.along_rows(scales.astype(jnp.float32), part.shape)
        return sum_

    def _operands(self, warpgroup: Any, slot: Any, memory: dict[str, Any]) -> Iterator[Any]:
        """Yields the groups of one copy, unpacked."""
        c, rows, chunk, piece = self.config, self.config.rows, self.chunk, self.piece
        a: Any = None
        for group in range(c.depth // chunk):
            centers = None
            if "centers" in self.names:
                centers = gate.load_rows(memory["centers_smem"].at[warpgroup, slot, group])
            start = group * chunk % piece
            if start == 0:
                codes = memory["codes_smem"].at[warpgroup, slot, :, pl.ds(group * chunk, piece)]
                if self.of_tokens:
                    a = inline.unpack_int8(codes, (rows, piece), simulated=self.simulated)
                else:
                    inside = centers if piece == chunk else None
                    a = inline.unpack_bf16(codes, (rows, piece), inside, None, simulated=self.simulated)
            operand = a if piece == chunk else a[:, start : start + chunk]
            if centers is not None and piece != chunk:
                operand = operand - compat.along_rows(centers - jnp.bfloat16(136), (rows, chunk))
            yield operand

    def _scaled(self, value: Any, sums: Any, memory: dict[str, Any]) -> Any:
        """Returns token_scales * (value / 16 - token_zeros * sums) of integers, and other values as they are."""
        if not self.of_tokens:
            return value
        of_tokens = [
            compat.along_columns(
                compat.load(memory["tokens_smem"].at[index, pl.ds(0, self.columns)], compat.COLUMNS), value.shape
            )
            for index in range(len(self.of_tokens))
        ]
        value = value * SIXTEENTH
        if sums is not None:
            value = value - of_tokens[1] * compat.along_rows(sums, value.shape)
        return value * of_tokens[0]
