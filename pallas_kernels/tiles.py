"""The program of prefill.py: blocks that walk over tiles, copies of operands ahead of products, and the tiles' ends.

    copying warpgroup    x [tokens, depth], codes [outputs, depth], scales -> `stages` slots of shared memory
    other warpgroups     codes -> registers -> wgmma with x.T -> [64, tokens], all inputs in order
    a tile's end         scales of rows and columns, outliers' product added, transposed, stored [tokens, out]

Outliers are one more product of a tile's end: features kept as numbers [tokens, kept], copied when the tile begins, by
their columns of the weight [out, kept], which go from the GPU's memory to registers.

With two splits the tile's two blocks, a cluster, have half of the inputs each; at the end each sends the other the sums
of half of the tokens and stores its own half.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, inline

if TYPE_CHECKING:
    from pallas_kernels.prefill import PrefillConfig

LEAST_PIECE: Final = 64  # codes, 32 bytes
SIXTEENTH: Final = 1 / 16  # int4 codes are unpacked as 16 times themselves

type Kind = Literal["w4a16", "w8a8", "w4a8"]


@dataclass(frozen=True)
class Tiles:
    """One kernel's sizes and program; `_gmem` names what lies in the GPU's memory, `_smem` in a block's own."""

    kind: Kind
    config: "PrefillConfig"
    steps: int
    stages: int
    group: int
    grids: int
    vectors: int
    kept: int
    token_tiles: int
    output_tiles: int
    ahead: bool
    simulated: bool

    @property
    def block(self) -> int:
        """Outputs of a block."""
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
        """Tokens that are written at a time."""
        return min(self.config.spill, self.stored)

    @property
    def stored(self) -> int:
        """Tokens of a tile that a block stores."""
        return self.config.tokens if self.in_xla else self.config.tokens // self.config.splits

    @property
    def in_xla(self) -> bool:
        """Whether splits are added by XLA: the interpreter has no copies between blocks."""
        return self.simulated and self.config.splits > 1

    def scratch(self, operand: Any) -> dict[str, Any]:
        """Returns the shared memory besides the pipeline's, by the names of the body's arguments."""
        c, rows, bf16, shared = self.config, compat.ROWS_OF_ACCUMULATOR, jnp.bfloat16, compat.SharedMemory
        result = jnp.float32 if self.in_xla else bf16
        turned = compat.tiled(rows if result == bf16 else rows // 2, result)
        found: dict[str, Any] = {"out_smem": shared((c.warpgroups, self.spill, rows), result, transforms=turned)}
        if self.kept:
            found["kept_smem"] = shared((c.tokens, self.kept), bf16, transforms=compat.tiled(self.kept, bf16))
            found["arrived"] = compat.Barrier(num_arrivals=1)
            found["read"] = compat.Barrier(num_arrivals=c.warpgroups)
        if c.splits > 1 and not self.in_xla:
            columns = compat.tiled(self.stored, jnp.float32)
            found["far_smem"] = shared((c.warpgroups, rows, self.stored), jnp.float32, transforms=columns)
            found["landed"] = compat.Barrier(num_arrivals=1, num_barriers=c.warpgroups)
        if self.simulated and self.kind != "w8a8":
            found["bounce"] = shared((c.warpgroups, rows, self.chunk), operand)
        if self.simulated and self.kept:
            found["kept_bounce"] = shared((c.warpgroups, rows, self.kept), bf16)
        return found

    def pipeline(self, step: Any, context: Any, operands: tuple[Any, ...], state: Any = None) -> Any:
        """Returns the pipeline of copies over a tile's inputs."""
        c, x, codes = self.config, operands[0], operands[1]
        shared: Any = {"collective_axes": ("peer",)} if c.cluster > 1 else {}
        groups, steps_of_group = c.depth // self.chunk, max(1, self.group // c.depth)
        first = lax.axis_index("split") * self.steps if c.splits > 1 else 0
        specs = [
            compat.BlockSpec(
                (c.tokens, c.depth), lambda k: (0, first + k), transforms=compat.tiled(self.chunk, x.dtype), **shared
            ),
            compat.BlockSpec(
                (self.block, c.depth), lambda k: (0, first + k), transforms=compat.tiled(self.piece, codes.dtype)
            ),
            *(
                compat.BlockSpec((groups, self.block), lambda k: ((first + k) // steps_of_group, 0))
                for _ in range(self.grids)
            ),
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

    def body(self, *references: Any, **memory: Any) -> None:
        """One warpgroup's program."""
        c, first_vector = self.config, 2 + self.grids
        operands, out_gmem = references[:first_vector], references[-1]
        rows_gmem = references[first_vector : first_vector + self.vectors]
        columns_gmem = references[first_vector + self.vectors : first_vector + 2 * self.vectors]
        kept_gmem = references[first_vector + 2 * self.vectors : -1]
        out_smem = memory["out_smem"]
        split = lax.axis_index("split") if c.splits > 1 else 0
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
                        compat.multiply(accumulator, a, b, memory["bounce"].at[warpgroup] if bounced else None)
                        compat.finish(0)
                    return accumulator

                def store(values: Any, place: int) -> None:
                    """Stores the tile's tokens from `place` on."""
                    rows = [compat.load(row.at[outputs], compat.ROWS, checked=False) for row in rows_gmem]
                    if kept_gmem:
                        compat.wait(memory["arrived"])
                    for start in range(0, self.stored, self.spill):
                        tokens = pl.ds(token + place + start, self.spill)
                        part = values[:, start : start + self.spill]
                        kept: Any = None
                        if kept_gmem:
                            kept = self._kept(kept_gmem[1].at[outputs], place + start, warpgroup, memory)
                        if rows:
                            part = self._scaled(part, rows, [column.at[tokens] for column in columns_gmem], kept)
                        compat.wait_out(0, wait_read_only=True)
                        transposed = compat.cast(part.astype(out_smem.dtype), compat.C_TRANSPOSED)
                        out_smem.at[warpgroup].T[...] = transposed
                        compat.commit()
                        target = out_gmem.at[split] if self.in_xla else out_gmem
                        compat.copy_out(out_smem.at[warpgroup], target.at[tokens, outputs])
                    if kept_gmem:
                        compat.arrive(memory["read"])

                def context(run: Any) -> None:
                    def accumulate(accumulator: Any) -> None:
                        run(accumulator)
                        self._share(accumulator[...], split, warpgroup, memory, store)

                    if kept_gmem:

                        @pl.when(warpgroup == 0)
                        def _() -> None:
                            pl.when(info.local_index > 0)(lambda: compat.wait(memory["read"]))
                            compat.copy_in(
                                kept_gmem[0].at[pl.ds(token, c.tokens)], memory["kept_smem"], memory["arrived"]
                            )

                    result = jnp.float32 if self.kind == "w4a16" else jnp.int32
                    shape = (compat.ROWS_OF_ACCUMULATOR, c.tokens)
                    compat.in_scope(accumulate, compat.Accumulator(shape, result))

                state = self._stage(info) if self.ahead else None
                self.pipeline(step, context, operands, state)(*of_tile(token, output), allocations=buffers)

            if kept_gmem:
                pl.when(warpgroup == 0)(lambda: compat.wait(memory["read"]))

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
            scales = scales.astype(jnp.float32).astype(jnp.bfloat16)
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

    def _share(
        self, sums: Any, split: Any, warpgroup: Any, memory: dict[str, Any], store: Callable[[Any, int], None]
    ) -> None:
        """Calls `store` with the sums of all inputs and the first token that they are of."""
        if self.config.splits == 1 or self.in_xla:
            store(sums, 0)
            return
        half, landed = self.stored, memory["landed"].at[warpgroup]
        for mine in range(2):

            @pl.when(split == mine)
            def _(mine: int = mine, other: int = 1 - mine) -> None:
                far = memory["far_smem"].at[warpgroup]
                sent = sums[:, other * half : (other + 1) * half]
                compat.send(sent, far, landed, cluster_idx=jnp.int32(other), cluster_dim="split")
                compat.wait(landed)
                kept = sums[:, mine * half : (mine + 1) * half]
                store(kept + compat.load(far, compat.C, checked=False), mine * half)

    def _kept(self, columns_gmem: Any, start: int, warpgroup: Any, memory: dict[str, Any]) -> Any:
        """Returns the product of the features that are kept as numbers, [64, spill]."""
        bounce = memory["kept_bounce"].at[warpgroup] if self.simulated else None
        columns = compat.load(columns_gmem, compat.C, checked=False)

        def product(accumulator: Any) -> Any:
            compat.multiply(accumulator, columns, memory["kept_smem"].at[pl.ds(start, self.spill)].T, bounce)
            return accumulator[...]

        shape = (compat.ROWS_OF_ACCUMULATOR, self.spill)
        return compat.in_scope(product, compat.Accumulator(shape, jnp.float32))

    def _scaled(self, values: Any, rows: list[Any], columns_gmem: list[Any], kept: Any) -> Any:
        """Returns token_scales * (scales * values - token_zeros * sums - token_sums * shifts) + scales * kept."""
        columns = [compat.load(column, compat.COLUMNS, checked=False) for column in columns_gmem]
        scales = rows[0] * SIXTEENTH if self.kind == "w4a8" else rows[0]
        values = values.astype(jnp.float32) * compat.along_rows(scales, values.shape)
        for row, column in zip(rows[1:], columns[1:], strict=True):
            values = values - compat.along_rows(row, values.shape) * compat.along_columns(column, values.shape)
        values = values * compat.along_columns(columns[0], values.shape)
        return values if kept is None else values + kept * compat.along_rows(rows[0], values.shape)
