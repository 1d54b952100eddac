"""The kernels of decode attention: one walks a cache, block by block, one adds what several blocks gathered of a head.

    block (row, head, split)   warpgroups 0.., each with tiles of its own: copies -> `Walk.step` .. `Walk.finish`
                               -> shared memory -> warpgroup 0 joins -> the result, or a part of it
    block (row, head)          warpgroups share the parts of the splits -> join -> the result

No order of additions depends on time.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels import compat, flash
from pallas_kernels.flash_kivi import KiviWalk
from pallas_kernels.flash_tokens import TokenWalk
from pallas_kernels.lanes_gpu import run

type Walk = TokenWalk | KiviWalk

JOINERS: Final = (4, 2, 1)  # warpgroups that add splits, each as many
AT_ONCE: Final = 8  # results that a warpgroup adds at once


@dataclass(frozen=True)
class AttentionConfig:
    """How the work is divided.

    Attributes:
      splits: blocks that share the tokens of one KV head.
      tile: tokens of one copy, a multiple of 64.
      stages: copies that a warpgroup has under way.
      warpgroups: of a block, each with a part of the block's tokens.
    """

    splits: int = 1
    tile: int = 128
    stages: int = 3
    warpgroups: int = 1


class Stream(NamedTuple):
    """What is read of every token: an array [pages, heads, tokens / unit, numbers]."""

    array: jax.Array
    unit: int


def attend(
    queries: BFloat16[Array, "rows heads dim"],
    walk: Walk,
    streams: list[Stream],
    lengths: Int32[Array, "rows"],
    table: Int32[Array, "rows slots"] | None,
    config: AttentionConfig,
    simulate: compat.Simulation | None,
    extra: Float32[Array, "rows kv_heads parts 64 columns"] | None = None,
    *,
    join_later: bool = False,
) -> BFloat16[Array, "rows heads dim"] | Float32[Array, "rows kv_heads splits 64 columns"]:
    """Runs the kernel that walks a cache, and the one that joins, where there is more than one part.

    Args:
      queries: after RoPE.
      walk: the programs of the cache's format.
      streams: what they read of it.
      lengths: tokens of each row.
      table: pages of each row, or None.
      config: how the work is divided.
      simulate: run in the interpreter on the CPU with these settings.
      extra: parts that another call gave, to be joined with those of this one.
      join_later: give the parts, for another call.
    """
    rows, heads, dim = queries.shape
    _, kv_heads, page, _ = streams[0].array.shape
    units = tuple(stream.unit for stream in streams)
    whole = config.splits == 1 and extra is None and not join_later
    kernel = _Kernel(config, walk, page, units, table is not None, whole, simulate is not None)
    given = [queries.reshape(rows, kv_heads, -1, dim), lengths, *(stream.array for stream in streams)]
    result = jax.ShapeDtypeStruct((rows, kv_heads, heads // kv_heads, dim), jnp.bfloat16)
    parts = jax.ShapeDtypeStruct((rows, kv_heads, config.splits, *flash.shape_of_result(dim)), jnp.float32)
    blocks = {"row": rows, "head": kv_heads}
    call = compat.kernel(
        kernel.body,
        out=result if whole else parts,
        scratch=kernel.scratch(streams),
        grid=blocks | {"split": config.splits},
        warpgroups=config.warpgroups,
        manual_barriers=True,
        simulate=simulate,
    )
    found = call(*given, *(() if table is None else (table,)))
    if join_later:
        return found
    if not whole:
        warpgroups = next(count for count in JOINERS if config.splits % count == 0)
        joiner = _Joiner(config.splits // warpgroups, warpgroups, walk, simulate is not None)
        call = compat.kernel(
            joiner.body,
            out=result,
            scratch=_scratch_to_join(warpgroups, dim),
            grid=blocks,
            warpgroups=warpgroups,
            manual_barriers=True,
            simulate=simulate,
        )
        found = call(found, *(() if extra is None else (extra,)))
    return found.reshape(queries.shape)


def _scratch_to_join(warpgroups: int, dim: int) -> dict[str, Any]:
    if warpgroups == 1:
        return {}
    return {
        "results_smem": compat.SharedMemory((warpgroups - 1, *flash.shape_of_result(dim)), jnp.float32),
        "told": compat.Barrier(num_arrivals=warpgroups - 1),
    }


def _join_warpgroups(
    mine: Any, extra: list[Any], count: int, memory: dict[str, Any], go_on: Callable[[Any], None], *, simulated: bool
) -> None:
    """Calls `go_on` with the sum of all warpgroups' results and `extra` ones, in the first of them alone."""
    warpgroup = lax.axis_index("wg")

    def join(others: list[Any]) -> None:
        if not others:
            go_on(mine)
            return
        out = jax.ShapeDtypeStruct(mine.shape, jnp.float32)
        go_on(run(flash.join, [], [mine, *others], (out,), simulated=simulated)[0])

    if count == 1:
        join(extra)
        return

    @pl.when(warpgroup > 0)
    def _() -> None:
        memory["results_smem"][warpgroup - 1] = mine
        compat.commit()
        compat.arrive(memory["told"])

    @pl.when(warpgroup == 0)
    def _() -> None:
        compat.wait(memory["told"])
        results = memory["results_smem"]
        join([*extra, *(compat.load(results.at[other], compat.C, checked=False) for other in range(count - 1))])


@dataclass(frozen=True)
class _Joiner:
    """The program that adds the splits of one KV head."""

    each: int
    warpgroups: int
    walk: Walk
    simulated: bool

    def body(self, parts_gmem: Any, *rest: Any, **memory: Any) -> None:
        """One block's program."""
        *extras, out_gmem = rest
        row, head, warpgroup = (lax.axis_index(name) for name in ("row", "head", "wg"))
        out = jax.ShapeDtypeStruct(flash.shape_of_result(self.walk.dim), jnp.float32)

        def load(ref: Any, index: Any) -> Any:
            return compat.load(ref.at[row, head, index], compat.C, checked=False)

        mine: list[Any] = []
        for start in range(0, self.each, AT_ONCE):
            some = range(start, min(self.each, start + AT_ONCE))
            mine += [load(parts_gmem, warpgroup * self.each + index) for index in some]
            mine = list(run(flash.join, [], mine, (out,), simulated=self.simulated))
        others = [load(extra, index) for extra in extras for index in range(extra.shape[2])]
        target = out_gmem.at[row, head]

        def write(whole: Any) -> None:
            _write(self.walk, target, whole, simulated=self.simulated)

        _join_warpgroups(mine[0], others, self.warpgroups, memory, write, simulated=self.simulated)


def _write(walk: Walk, target: Any, result: Any, *, simulated: bool) -> None:
    program = functools.partial(flash.write, shape=(walk.share, walk.dim), group=walk.group)
    run(program, [target], [result], (), 1, simulated=simulated)


@dataclass(frozen=True)
class _Kernel:
    """One kernel's sizes and program; `_gmem` names what lies in the GPU's memory, `_smem` in a block's own."""

    config: AttentionConfig
    walk: Walk
    page: int
    units: tuple[int, ...]
    paged: bool
    whole: bool
    simulated: bool

    @property
    def copied(self) -> int:
        """Returns the tokens of one copy."""
        return min(self.page, self.config.tile)

    def scratch(self, streams: list[Stream]) -> dict[str, Any]:
        """Returns the shared memory and barriers, by the names of the body's arguments."""
        c, shared, dim = self.config, compat.SharedMemory, self.walk.dim
        slots = (c.warpgroups, c.stages)
        found: dict[str, Any] = {
            f"stream{index}_smem": shared((*slots, c.tile // stream.unit, stream.array.shape[3]), stream.array.dtype)
            for index, stream in enumerate(streams)
        }
        copies = len(streams) * (c.tile // self.copied)
        found["full"] = compat.Barrier(num_arrivals=copies, num_barriers=c.warpgroups * c.stages)
        if c.stages * c.tile * self.walk.row < flash.bytes_to_meet(dim):
            found["exchange_smem"] = shared((c.warpgroups, flash.bytes_to_meet(dim) // 4), jnp.float32)
        return found | _scratch_to_join(c.warpgroups, dim)

    def body(self, queries_gmem: Any, lengths_gmem: Any, *rest: Any, **memory: Any) -> None:
        """One block's program."""
        *streams, out_gmem = rest
        table_gmem = streams.pop() if self.paged else None
        c, walk = self.config, self.walk
        row, head, split, warpgroup = (lax.axis_index(name) for name in ("row", "head", "split", "wg"))
        length, parts = lengths_gmem[row], c.splits * c.warpgroups
        tiles = lax.div(length + (c.tile - 1), c.tile)
        part = split * c.warpgroups + warpgroup
        first = lax.div(part * tiles, parts)
        count = lax.div((part + 1) * tiles, parts) - first
        slots = [memory[f"stream{index}_smem"].at[warpgroup] for index in range(len(streams))]

        def fetch(step: Any, slot: Any) -> None:
            barrier = memory["full"].at[warpgroup * c.stages + slot]
            for start in range(0, c.tile, self.copied):
                token = (first + step) * c.tile + start
                inside = lax.rem(token, self.page)
                page = row if table_gmem is None else table_gmem[row, lax.div(token, self.page)]
                for stream, target, unit in zip(streams, slots, self.units, strict=True):
                    here, there = (
                        pl.ds(lax.div(inside, unit), self.copied // unit),
                        pl.ds(start // unit, self.copied // unit),
                    )
                    compat.copy_in(stream.at[page, head, here], target.at[slot, there], barrier)

        for slot in range(c.stages):

            @pl.when(slot < count)
            def _(slot: int = slot) -> None:
                fetch(slot, slot)

        struct = jax.ShapeDtypeStruct
        state = struct(flash.shape_of_state(walk.dim), jnp.float32)
        begun = struct(flash.shape_of_queries(walk.dim), jnp.int32), struct((64, 8), jnp.float32), state
        queries, sums, start = run(walk.begin, [queries_gmem.at[row, head]], [], begun, simulated=self.simulated)

        def step(index: Any, carried: Any) -> Any:
            slot = lax.rem(index, c.stages)
            compat.wait(memory["full"].at[warpgroup * c.stages + slot])
            limit = jnp.full((64, 8), length - (first + index) * c.tile, jnp.int32)
            refs = [each.at[slot] for each in slots]
            given = [queries, sums, carried, compat.cast(limit, compat.C)]
            (carried,) = run(walk.step, refs, given, (state,), simulated=self.simulated)
            if self.simulated:  # the program itself waits for all threads
                compat.commit()

            @pl.when(index + c.stages < count)
            def _() -> None:
                fetch(index + c.stages, slot)

            return carried

        end = lax.fori_loop(0, count, step, start)
        exchange = memory.get("exchange_smem", memory["stream0_smem"]).at[warpgroup]
        result = struct(flash.shape_of_result(walk.dim), jnp.float32)
        (met,) = run(walk.finish, [exchange], [end], (result,), simulated=self.simulated)

        def store(result: Any) -> None:
            if self.whole:
                _write(walk, out_gmem.at[row, head], result, simulated=self.simulated)
            else:
                out_gmem[row, head, split] = result

        _join_warpgroups(met, [], c.warpgroups, memory, store, simulated=self.simulated)
