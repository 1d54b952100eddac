"""Matrix products of many tokens, bound by the tensor cores: W4A16, W8A8 and W4A8, one program.

    y[m, n] = sum_k x[m, k] * scales[k // g, n] * (codes[n, k] - zeros[k // g, n])                             W4A16
    y[m, n] = token_scales[m] * (scales[n] * sum_k x[m, k] * codes[n, k] - token_zeros[m] * sums[n]       W8A8, W4A8
                                 - shifts[n] * sum_k x[m, k])

A block stays on its multiprocessor and walks over tiles of `warpgroups` x 64 outputs by `tokens`, in an order that
keeps neighbouring blocks' operands in the second cache; one more warpgroup does nothing but copy, `stages` copies ahead
and from tile to tile without a pause. The blocks of a cluster, side by side along the outputs, get the same activations
by one copy:

                    tokens
                +------------+   A step of depth k: 64 outputs' codes -> registers (int4 to bfloat16 or int8) or, int8,
    64 outputs  | warpgroup 0|   shared memory; wgmma with x.T [k, tokens] from shared memory -> [64, tokens].
    64 outputs  | warpgroup 1|   At a tile's end: scales of rows and columns, transposed through shared memory, stored
                +------------+   [m, out] by the copy engine while the next tile's first operands arrive.

A group's scale is multiplied into the bfloat16 weight (one rounding, as of a weight kept in bfloat16); scales of
integers come after the exact int32 sums. One warpgroup adds all of a tile's inputs in order: the same inputs give the
same bits.

Roofline: 2 m n k over the tensor cores' rate: XLA's bfloat16 product of 8192^3 runs at 821 TFLOP/s on the card that was
measured, its int8 product at 1570. Measured with this kernel's draft, 2026-11-22, on an H100 80GB HBM3 (jax 0.11.2,
kernel time by CUPTI, median; `python -m pallas_kernels.bench` measures anew), m = 2048, n = k = 8192; XLA's bfloat16
product takes 332 us, its int8 product with scales 247:

    W4A16    329.5 us    834 TFLOP/s    1.01 times XLA's bfloat16
    W8A8     168.3 us   1634 TOP/s      1.97 times, and 1.46 times XLA's int8
    W4A8     158.5 us   1734 TOP/s      2.10 times, and 1.56 times XLA's int8

LLM.int8's outlier columns are not added here. Added by XLA behind W8A8 (158.8 us in that run), 32, 64 or 128 of them
cost 65 to 70 us, the two passes over y; in this epilogue 64 columns would be one step of wgmma more, about 3 us.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16, Float32, Int, Int8

from pallas_kernels import compat, inline, order

PADDED: Final = 8  # tokens are a multiple of it
LEAST_PIECE: Final = 64  # codes, 32 bytes
SIXTEENTH: Final = 1 / 16  # int4 codes are unpacked as 16 times themselves

type Kind = Literal["w4a16", "w8a8", "w4a8"]


@dataclass(frozen=True)
class PrefillConfig:
    """How the work is divided.

    Attributes:
      tokens: tokens of a tile, at most 256.
      depth: inputs of one step.
      stages: steps whose operands are under way.
      warpgroups: warpgroups that multiply, each 64 outputs.
      cluster: blocks side by side along the outputs that share their activations.
      blocks: blocks that walk over the tiles; 0 for one block for each tile.
      width: tiles after which the walk turns, so that its operands stay in the second cache.
      along: the direction of the walk's turns.
      spill: tokens that are written at a time.
    """

    tokens: int = 256
    depth: int = 64
    stages: int = 4
    warpgroups: int = 2
    cluster: int = 2
    blocks: int = 132
    width: int = 4
    along: Literal["tokens", "outputs"] = "tokens"
    spill: int = 256

    def fault(self, outputs: int, inputs: int, groups: int) -> str | None:
        """Returns why a weight cannot be multiplied with this configuration; None where it can."""
        side = compat.ROWS_OF_ACCUMULATOR * self.warpgroups * self.cluster
        if outputs % side:
            return f"{outputs} outputs are no multiple of {side}"
        group = inputs // groups
        if inputs % self.depth or (group % self.depth and self.depth % group):
            return f"{inputs} inputs in groups of {group} and steps of {self.depth} do not divide one another"
        if group % order.RUN or self.depth % LEAST_PIECE:
            return f"groups of {group} are no multiple of {order.RUN}, or steps of {self.depth} none of {LEAST_PIECE}"
        if self.tokens % min(self.spill, self.tokens):
            return f"{self.tokens} tokens are no multiple of {self.spill} that are written at a time"
        return None


def w4a16_prefill(
    x: BFloat16[Array, "tokens in"],
    codes: Int[Array, "out in"],
    scales: BFloat16[Array, "groups out"],
    centers: BFloat16[Array, "groups out"] | None = None,
    *,
    config: PrefillConfig,
    simulate: compat.Simulation | None = None,
) -> BFloat16[Array, "tokens out"]:
    """Multiplies bfloat16 activations by an int4 weight.

    Args:
      x: activations.
      codes: int4 in the order of `order.stored_bf16`.
      scales: the groups' steps; one group is "per channel".
      centers: 136 + zeros; None where all zeros are 0.
      config: how the work is divided.
      simulate: run in the interpreter on the CPU with these settings.

    Raises:
      ValueError: the configuration does not fit the weight.
    """
    grids = [scales] if centers is None else [scales, centers]
    return _run("w4a16", x, codes, grids, [], [], config, simulate)


def integer_prefill(
    x: Int8[Array, "tokens in"],
    token_scales: Float32[Array, "tokens"],
    token_zeros: Float32[Array, "tokens"] | None,
    codes: Int[Array, "out in"],
    scales: Float32[Array, "out"],
    sums: Float32[Array, "out"] | None = None,
    shifts: Float32[Array, "out"] | None = None,
    *,
    config: PrefillConfig,
    simulate: compat.Simulation | None = None,
) -> BFloat16[Array, "tokens out"]:
    """Multiplies int8 activations by an int8 or int4 weight, the sums exact in int32.

    Args:
      x: codes of the activations; 4-bit codes are int8 too.
      token_scales: the step of each token's grid.
      token_zeros: the code that stands for 0, for each token; None where all are 0.
      codes: int8 as they are, or int4 in the order of `order.stored_int8`.
      scales: the step of each output's grid.
      sums: the sums of the weight over its inputs, wanted where `token_zeros` are given.
      shifts: each output's scale times the code that stands for 0; None where all are 0.
      config: how the work is divided.
      simulate: run in the interpreter on the CPU with these settings.

    Raises:
      ValueError: the configuration does not fit the weight, or `sums` are wanting.
    """
    rows, columns = [scales], [token_scales]
    if token_zeros is not None:
        if sums is None:
            raise ValueError("tokens have zeros but the weight no sums: give what prepare_w8a8 or prepare_w4a8 returns")
        rows, columns = [scales, sums], [token_scales, token_zeros]
    if shifts is not None:
        rows.append(shifts)
        columns.append(jnp.sum(x, axis=1, dtype=jnp.int32).astype(jnp.float32))
    return _run("w4a8" if codes.dtype == jnp.int4 else "w8a8", x, codes, [], rows, columns, config, simulate)


def _run(
    kind: Kind,
    x: jax.Array,
    codes: jax.Array,
    grids: list[jax.Array],
    rows: list[jax.Array],
    columns: list[jax.Array],
    config: PrefillConfig,
    simulate: compat.Simulation | None,
) -> jax.Array:
    (m, k), n, simulated = x.shape, codes.shape[0], simulate is not None
    groups = grids[0].shape[0] if grids else 1
    fault = config.fault(n, k, groups)
    if fault:
        raise ValueError(f"prefill of a weight [{n}, {k}] with {config}: {fault}")
    token_tiles = compat.whole_tiles(m, config.tokens)
    whole = token_tiles * config.tokens
    padded = whole if simulated else PADDED * compat.whole_tiles(m, PADDED)  # copies fill and drop what lies outside
    x = jnp.pad(x, ((0, padded - m), (0, 0))) if padded != m else x
    columns = [jnp.pad(each, (0, whole - m)) if whole != m else each for each in columns]
    output_tiles = n // (compat.ROWS_OF_ACCUMULATOR * config.warpgroups * config.cluster)
    tiles = token_tiles * output_tiles
    rounds = compat.whole_tiles(tiles, (config.blocks or tiles * config.cluster) // config.cluster)
    blocks = compat.whole_tiles(tiles, rounds)
    stages = min(config.stages, k // config.depth)
    kernel = _Kernel(  # the interpreter waits for ever where a cluster's copies go on from one tile to the next
        kind=kind,
        config=config,
        steps=k // config.depth,
        stages=stages,
        group=k // groups,
        grids=len(grids),
        vectors=len(rows),
        token_tiles=token_tiles,
        output_tiles=output_tiles,
        ahead=tiles // blocks >= 2 and k // config.depth % stages == 0 and not (simulated and config.cluster > 1),
        simulated=simulated,
    )
    call = compat.kernel(
        kernel.body,
        out=jax.ShapeDtypeStruct((padded, n), jnp.bfloat16),
        scratch=kernel.scratch(x.dtype),
        grid={"block": blocks},
        cluster={"peer": config.cluster} if config.cluster > 1 else None,
        warpgroups=config.warpgroups + 1,
        manual_barriers=True,
        simulate=simulate,
    )
    y = call(x, codes, *grids, *rows, *columns)
    return y[:m] if padded != m else y


@dataclass(frozen=True)
class _Kernel:
    """One kernel's sizes and program; `_gmem` names what lies in the GPU's memory, `_smem` in a block's own."""

    kind: Kind
    config: PrefillConfig
    steps: int
    stages: int
    group: int
    grids: int
    vectors: int
    token_tiles: int
    output_tiles: int
    ahead: bool
    simulated: bool

    @property
    def block(self) -> int:
        return compat.ROWS_OF_ACCUMULATOR * self.config.warpgroups

    @property
    def chunk(self) -> int:
        """Inputs of a step that share their scales."""
        return min(self.config.depth, self.group)

    @property
    def piece(self) -> int:
        """Inputs that are unpacked at once: the least that shared memory can swizzle is 64 codes."""
        return max(self.chunk, LEAST_PIECE)

    @property
    def spill(self) -> int:
        return min(self.config.spill, self.config.tokens)

    def scratch(self, operand: Any) -> dict[str, Any]:
        """Returns the shared memory besides the pipeline's, by the names of the body's arguments."""
        c, rows, bf16 = self.config, compat.ROWS_OF_ACCUMULATOR, jnp.bfloat16
        place = compat.SharedMemory((c.warpgroups, self.spill, rows), bf16, transforms=compat.tiled(rows, bf16))
        bounce = compat.SharedMemory((c.warpgroups, rows, self.chunk), operand)
        return {"out_smem": place} | ({"bounce": bounce} if self.simulated and self.kind != "w8a8" else {})

    def pipeline(self, step: Any, context: Any, operands: tuple[Any, ...], state: Any = None) -> Any:
        """Returns the pipeline of copies over a tile's inputs."""
        c, x, codes = self.config, operands[0], operands[1]
        shared: Any = {"collective_axes": ("peer",)} if c.cluster > 1 else {}
        groups, steps_of_group = c.depth // self.chunk, max(1, self.group // c.depth)
        specs = [
            compat.BlockSpec(
                (c.tokens, c.depth), lambda k: (0, k), transforms=compat.tiled(self.chunk, x.dtype), **shared
            ),
            compat.BlockSpec((self.block, c.depth), lambda k: (0, k), transforms=compat.tiled(self.piece, codes.dtype)),
            *(compat.BlockSpec((groups, self.block), lambda k: (k // steps_of_group, 0)) for _ in range(self.grids)),
        ]
        return compat.pipeline(
            step,
            grid=(self.steps,),
            memory_registers=compat.PRODUCER_REGISTERS,
            in_specs=specs,
            wg_axis="wg",
            num_compute_wgs=c.warpgroups,
            max_concurrent_steps=self.stages,
            compute_context=context,
            pipeline_state=state,
        )

    def body(self, *references: Any, out_smem: Any, bounce: Any = None) -> None:
        """One warpgroup's program."""
        c, first_vector = self.config, 2 + self.grids
        operands, out_gmem = references[:first_vector], references[-1]
        rows_gmem = references[first_vector : first_vector + self.vectors]
        columns_gmem = references[first_vector + self.vectors : -1]
        tiles = self.token_tiles * self.output_tiles

        def of_tile(token: Any, output: Any) -> tuple[Any, ...]:
            x_gmem, codes_gmem, *grids_gmem = operands
            outputs = pl.ds(output, self.block)
            return (
                x_gmem.at[pl.ds(token, c.tokens), :],
                codes_gmem.at[outputs, :],
                *(grid.at[:, outputs] for grid in grids_gmem),
            )

        def walk(buffers: Any) -> None:
            warpgroup = lax.axis_index("wg")
            peer = lax.axis_index("peer") if c.cluster > 1 else 0
            mine = pl.ds(warpgroup * compat.ROWS_OF_ACCUMULATOR, compat.ROWS_OF_ACCUMULATOR)

            @compat.loop_over_tiles((tiles,), collective_axes="block")
            def _(info: Any) -> None:
                (index,) = info.index
                minor = ("tokens", "outputs").index(c.along)
                token_tile, output_tile = compat.snake(index, (self.token_tiles, self.output_tiles), minor, c.width)
                token, output = token_tile * c.tokens, (output_tile * c.cluster + peer) * self.block
                outputs = pl.ds(output + warpgroup * compat.ROWS_OF_ACCUMULATOR, compat.ROWS_OF_ACCUMULATOR)

                def step(_: Any, x_smem: Any, codes_smem: Any, *rest: Any) -> Any:
                    *grids_smem, accumulator = rest
                    grids = [grid.at[:, mine] for grid in grids_smem]
                    bounced = self.simulated and self.kind != "w8a8"
                    for inputs, a in self._weights(codes_smem.at[mine], grids):
                        b = x_smem.at[:, inputs].T if self.chunk < c.depth else x_smem.T
                        compat.multiply(accumulator, a, b, bounce.at[warpgroup] if bounced else None)
                        compat.finish(0)
                    return accumulator

                def store(values: Any) -> None:
                    rows = [compat.load(row.at[outputs], compat.ROWS, checked=False) for row in rows_gmem]
                    for start in range(0, c.tokens, self.spill):
                        tokens = pl.ds(token + start, self.spill)
                        part = values[:, start : start + self.spill]
                        if rows:
                            part = self._scaled(part, rows, [column.at[tokens] for column in columns_gmem])
                        compat.wait_out(0, wait_read_only=True)
                        transposed = compat.cast(part.astype(jnp.bfloat16), compat.C_TRANSPOSED)
                        out_smem.at[warpgroup].T[...] = transposed
                        compat.commit()
                        compat.copy_out(out_smem.at[warpgroup], out_gmem.at[tokens, outputs])

                def context(run: Any) -> None:
                    def accumulate(accumulator: Any) -> None:
                        run(accumulator)
                        store(accumulator[...])

                    result = jnp.float32 if self.kind == "w4a16" else jnp.int32
                    shape = (compat.ROWS_OF_ACCUMULATOR, c.tokens)
                    compat.in_scope(accumulate, compat.Accumulator(shape, result))

                state = self._stage(info) if self.ahead else None
                self.pipeline(step, context, operands, state)(*of_tile(token, output), allocations=buffers)

        def nothing(*_: Any) -> None:
            return None

        buffers = self.pipeline(nothing, nothing, operands).get_allocations(*of_tile(0, 0))
        pl.run_scoped(walk, buffers, collective_axes="wg")
        compat.wait_out(0)

    def _stage(self, info: Any) -> Any:
        """Tells the pipeline which of a block's tiles this is, so that copies go on from one to the next."""
        last = info.local_index == info.num_local_steps - 1
        later = jnp.where(last, jnp.int32(compat.Stage.STOP), jnp.int32(compat.Stage.STEADY))
        return jnp.where(info.local_index == 0, jnp.int32(compat.Stage.START), later)

    def _weights(self, codes_smem: Any, grids_smem: list[Any]) -> Iterator[tuple[Any, Any]]:
        """Yields the inputs and operand A of each product of a step: int8 by reference, unpacked int4 in registers."""
        c, rows, chunk, piece = self.config, compat.ROWS_OF_ACCUMULATOR, self.chunk, self.piece
        if self.kind == "w8a8":
            yield pl.ds(0, c.depth), codes_smem
            return
        if self.kind == "w4a8":
            yield pl.ds(0, c.depth), inline.unpack_int8(codes_smem, (rows, c.depth), simulated=self.simulated)
            return
        a: Any = None
        for group in range(c.depth // chunk):
            scales, *centers = [compat.load(grid.at[group], compat.ROWS) for grid in grids_smem]
            first, start = group * chunk, group * chunk % piece
            codes = codes_smem if piece == c.depth else codes_smem.at[:, pl.ds(first - start, piece)]
            if chunk == piece:
                center = centers[0] if centers else None
                a = inline.unpack_bf16(codes, (rows, piece), center, scales, simulated=self.simulated)
                yield pl.ds(first, chunk), a
                continue
            if start == 0:
                a = inline.unpack_bf16(codes, (rows, piece), None, None, simulated=self.simulated)
            values = a[:, start : start + chunk]
            if centers:
                values = values - compat.along_rows(centers[0] - jnp.bfloat16(136), (rows, chunk))
            yield pl.ds(first, chunk), values * compat.along_rows(scales, (rows, chunk))

    def _scaled(self, values: Any, rows: list[Any], columns_gmem: list[Any]) -> Any:
        """Returns token_scales * (scales * values - token_zeros * sums - token_sums * shifts), as far as given."""
        columns = [compat.load(column, compat.COLUMNS, checked=False) for column in columns_gmem]
        scales = rows[0] * SIXTEENTH if self.kind == "w4a8" else rows[0]
        values = values.astype(jnp.float32) * compat.along_rows(scales, values.shape)
        for row, column in zip(rows[1:], columns[1:], strict=True):
            values = values - compat.along_rows(row, values.shape) * compat.along_columns(column, values.shape)
        return values * compat.along_columns(columns[0], values.shape)
