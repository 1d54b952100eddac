"""The kernels of decode attention: one walks a cache, block by block, one adds what several blocks gathered of a head.

    block (row, head, split)   warpgroups 0.., each with tiles of its own: copies -> `Walk.step` .. `Walk.finish`
                               -> shared memory -> warpgroup 0 joins -> the result, or a part of it
    block (row, head, piece)   a tile of each warp's numbers, of all splits -> join -> a piece of the result

No order of additions depends on time. Tiles taken "in turns", each warpgroup every n-th, let its first one be known,
and asked for, before the row's length is. The blocks of coded tokens walk KIVI's window too (`Window`).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16, Int32

from pallas_kernels import compat, flash
from pallas_kernels.attention_join import Joiner, join_warpgroups, scratch_to_join
from pallas_kernels.attention_new import NewToken, Writing, scratch_to_write, spread, write_new
from pallas_kernels.flash_kivi import KiviWalk
from pallas_kernels.flash_tokens import TokenWalk
from pallas_kernels.lanes_gpu import run

type Walk = TokenWalk | KiviWalk

EARLY: Final = 4  # tiles that each warpgroup would have in a full row: one is asked for before the length is known
WINDOW_TILE: Final = 64  # tokens of a window that a warpgroup walks at once


@dataclass(frozen=True)
class AttentionConfig:
    """How the work is divided.

    Attributes:
      splits: blocks that share the tokens of one KV head.
      tile: tokens of one copy, a multiple of 64.
      stages: copies that a warpgroup has under way.
      warpgroups: of a block, each with a part of the block's tokens.
      tiles: which ones are a warpgroup's: every n-th, or neighbours.
    """

    splits: int = 1
    tile: int = 128
    stages: int = 3
    warpgroups: int = 1
    tiles: Literal["in turns", "in runs"] = "in turns"


class Stream(NamedTuple):
    """What is read of every token: an array [pages, heads, tokens / unit, numbers], or a mutable one."""

    array: Any
    unit: int


class Window(NamedTuple):
    """Tokens in bfloat16 that are seen beside the coded ones; page b is row b, of whole `WINDOW_TILE`s.

    Attributes:
      keys: [rows, heads, tokens, dim].
      values: the same.
      lengths: tokens of each row.
    """

    keys: BFloat16[Array, "rows kv_heads tokens dim"]
    values: BFloat16[Array, "rows kv_heads tokens dim"]
    lengths: Int32[Array, "rows"]


def attend_to_new(
    token: NewToken, walk: Walk, streams: list[Stream], config: AttentionConfig, simulate: compat.Simulation | None
) -> BFloat16[Array, "rows kv_heads share dim"]:
    """Runs the kernel that walks a cache, of one split, and writes each row's new token into it first.

    Args:
      token: the new one.
      walk: the programs of the cache's format.
      streams: what they read of it, of mutable arrays.
      config: how the work is divided.
      simulate: run in the interpreter on the CPU with these settings.
    """
    assert config.splits == 1
    rows, kv_heads, page, _ = streams[0].array.shape
    units = tuple(stream.unit for stream in streams)
    kernel = _Kernel(config, walk, page, units, False, False, True, simulate is not None, token.writing, token.capacity)
    call = compat.kernel(
        kernel.body,
        out=jax.ShapeDtypeStruct((rows, kv_heads, walk.share, walk.dim), jnp.bfloat16),
        scratch=kernel.scratch(streams),
        grid={"row": rows, "head": kv_heads, "split": 1},
        warpgroups=config.warpgroups,
        manual_barriers=True,
        simulate=simulate,
    )
    found: Array = call(token.projected, token.positions, token.angles, *(stream.array for stream in streams))
    return found


def attend(
    queries: BFloat16[Array, "rows heads dim"],
    walk: Walk,
    streams: list[Stream],
    lengths: Int32[Array, "rows"],
    table: Int32[Array, "rows slots"] | None,
    config: AttentionConfig,
    simulate: compat.Simulation | None,
    window: Window | None = None,
) -> BFloat16[Array, "rows heads dim"]:
    """Runs the kernel that walks a cache, and the one that joins, where there is more than one split.

    Args:
      queries: after RoPE.
      walk: the programs of the cache's format.
      streams: what they read of it.
      lengths: tokens of each row.
      table: pages of each row, or None.
      config: how the work is divided.
      simulate: run in the interpreter on the CPU with these settings.
      window: other tokens to walk, or None.
    """
    rows, heads, dim = queries.shape
    _, kv_heads, page, _ = streams[0].array.shape
    units = tuple(stream.unit for stream in streams)
    whole = config.splits == 1
    kernel = _Kernel(config, walk, page, units, table is not None, window is not None, whole, simulate is not None)
    given = [queries.reshape(rows, kv_heads, -1, dim), lengths, *(window or ()), *(stream.array for stream in streams)]
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
    if not whole:
        write = functools.partial(flash.write, shape=(walk.share, dim), group=walk.group)
        join = Joiner(config.splits, dim, write, simulate is not None)
        call = compat.kernel(
            join.body, out=result, scratch={}, grid=blocks | join.blocks, manual_barriers=True, simulate=simulate
        )
        found = call(found)
    return found.reshape(queries.shape)


@dataclass(frozen=True)
class _Kernel:
    """One kernel's sizes and program; `_gmem` names what lies in the GPU's memory, `_smem` in a block's own."""

    config: AttentionConfig
    walk: Walk
    page: int
    units: tuple[int, ...]
    paged: bool
    windowed: bool
    whole: bool
    simulated: bool
    writing: Writing | None = None
    capacity: int = 0

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
        if self.writing is not None:
            found |= scratch_to_write(self.walk.share, dim)
        return found | scratch_to_join(c.warpgroups, dim)

    @property
    def early(self) -> bool:
        """Tells whether the first copies may start before a row's length is known: few reads in vain, and no page."""
        parts = self.config.splits * self.config.warpgroups
        return self.config.tiles == "in turns" and not self.paged and self.page >= EARLY * parts * self.config.tile

    def body(self, queries_gmem: Any, lengths_gmem: Any, *rest: Any, **memory: Any) -> None:
        """One block's program; queries before RoPE, positions and angles come first where there is a new token."""
        *streams, out_gmem = rest
        angles_gmem: Any = streams.pop(0) if self.writing is not None else None
        window = [streams.pop(0) for _ in range(3)] if self.windowed else None
        table_gmem = streams.pop() if self.paged else None
        c, walk = self.config, self.walk
        row, head, split, warpgroup = (lax.axis_index(name) for name in ("row", "head", "split", "wg"))
        part, parts = split * c.warpgroups + warpgroup, c.splits * c.warpgroups
        slots = [memory[f"stream{index}_smem"].at[warpgroup] for index in range(len(streams))]

        def full(slot: Any) -> Any:
            return memory["full"].at[warpgroup * c.stages + slot]

        def fetch(tile: Any, slot: Any) -> None:
            for start in range(0, c.tile, self.copied):
                token = tile * c.tile + start
                inside = lax.rem(token, self.page)
                page = row if table_gmem is None else table_gmem[row, lax.div(token, self.page)]
                for stream, target, unit in zip(streams, slots, self.units, strict=True):
                    here, there = (
                        pl.ds(lax.div(inside, unit), self.copied // unit),
                        pl.ds(start // unit, self.copied // unit),
                    )
                    compat.copy_in(stream.at[page, head, here], target.at[slot, there], full(slot))

        position = lengths_gmem[row]

        def tiles() -> tuple[Any, ...]:
            """Returns the row's length, what `_tiles` does, and the new token's tile. It waits for the position."""
            if self.writing is None:
                return position, *self._tiles(position, c.tile, part, parts), None
            length = jnp.minimum(position + 1, self.capacity)
            late = lax.div(jnp.minimum(position, self.page - 1), c.tile)
            return length, *self._tiles(length, c.tile, part, parts), late

        def begin() -> None:
            if self.early:
                fetch(part, 0)
            _, first, apart, count, late = tiles()
            for slot in range(int(self.early), c.stages):

                @pl.when((slot < count) if late is None else (slot < count) & (first + slot * apart != late))
                def _(slot: int = slot) -> None:
                    fetch(first + slot * apart, slot)

        queries = queries_gmem.at[row, head]
        if self.writing is None:
            begin()
        else:
            queries = memory["queries_smem"]
            numbers = queries_gmem.at[row], angles_gmem.at[row]
            around = functools.partial(self._around, streams, row, head, position)
            write_new(self.writing, numbers, head, around, begin, memory, c.warpgroups, simulated=self.simulated)
        length, first, apart, count, late = tiles()
        queries, sums, start = self._begin(queries, window, (row, head, part, parts))
        if late is not None:
            self._fetch_late(late, (first, apart, count), full, fetch, memory)
        struct = jax.ShapeDtypeStruct
        state = struct(flash.shape_of_state(walk.dim), jnp.float32)

        def step(index: Any, carried: Any) -> Any:
            slot = lax.rem(index, c.stages)
            compat.wait(full(slot))
            limit = spread(length - (first + index * apart) * c.tile)
            refs = [each.at[slot] for each in slots]
            (carried,) = run(walk.step, refs, [queries, sums, carried, limit], (state,), simulated=self.simulated)
            if self.simulated:  # the program itself waits for all threads
                compat.commit()

            @pl.when(index + c.stages < count)
            def _() -> None:
                tile = first + (index + c.stages) * apart
                if late is not None:
                    pl.when(tile == late)(lambda: compat.wait(memory["kept"]))
                fetch(tile, slot)

            return carried

        end = lax.fori_loop(0, count, step, start)
        if self.early:  # what nobody needed must have arrived before its memory is another's

            @pl.when(count < 1)
            def _() -> None:
                compat.wait(full(0))

        exchange = memory.get("exchange_smem", memory["stream0_smem"]).at[warpgroup]
        result = struct(flash.shape_of_result(walk.dim), jnp.float32)
        (met,) = run(walk.finish, [exchange], [end], (result,), simulated=self.simulated)

        write = functools.partial(flash.write, shape=(walk.share, walk.dim), group=walk.group, piece=(0, 1))

        def store(result: Any) -> None:
            if self.whole:
                run(write, [out_gmem.at[row, head]], [result], (), 1, simulated=self.simulated)
            else:
                out_gmem[row, head, split] = result

        join_warpgroups(met, c.warpgroups, memory, store, simulated=self.simulated)

    def _around(self, streams: list[Any], row: Any, head: Any, position: Any) -> tuple[list[Any], Any]:
        """Returns references to the tokens of one instruction, the new one among them, and its place there."""
        group = flash.GROUP
        first = lax.div(jnp.minimum(position, self.page - 1), group) * group
        some = [
            stream.at[row, head, pl.ds(lax.div(first, unit), group // unit)]
            for stream, unit in zip(streams, self.units, strict=True)
        ]
        return some, position - first

    def _fetch_late(
        self,
        late: Any,
        tiles: tuple[Any, int, Any],
        full: Callable[[Any], Any],
        fetch: Callable[[Any, Any], None],
        memory: dict[str, Any],
    ) -> None:
        """Asks for the new token's tile when it is written, where it is one of a part's first (see `_tiles`)."""
        first, apart, count = tiles
        slot = lax.div(late - first, apart)
        mine = (late >= first) & (first + slot * apart == late)

        @pl.when(mine & (slot < jnp.minimum(count, self.config.stages)))
        def _() -> None:
            if self.early:

                @pl.when(slot == 0)
                def _() -> None:  # it came in vain, maybe before the token did
                    compat.wait(full(0))
                    compat.commit()  # all threads have waited, before the next copy may end

            compat.wait(memory["kept"])
            fetch(late, slot)

    def _tiles(self, length: Any, tile: int, part: Any, parts: int) -> tuple[Any, int, Any]:
        """Returns the first of a part's tiles, how far they lie apart, and how many there are."""
        tiles = lax.div(length + (tile - 1), tile)
        if self.config.tiles == "in turns":
            return part, parts, lax.div(tiles - part + (parts - 1), parts)
        first = lax.div(part * tiles, parts)
        return first, 1, lax.div((part + 1) * tiles, parts) - first

    def _begin(self, queries: Any, window: list[Any] | None, place: tuple[Any, Any, Any, int]) -> Any:
        """Returns queries, their sums and the state before the first coded token, with the window's tokens in it."""
        (row, head, part, parts), dim = place, self.walk.dim
        struct = jax.ShapeDtypeStruct
        state = struct(flash.shape_of_state(dim), jnp.float32)
        begun = struct(flash.shape_of_queries(dim), jnp.int32), struct((64, 8), jnp.float32), state
        walked = None
        if window is not None:
            keys, values, lengths = window
            plain = TokenWalk(16, dim, self.walk.share, WINDOW_TILE, "none", self.walk.group)
            exact, unused, nothing = run(plain.begin, [queries], [], begun, simulated=self.simulated)
            length = lengths[row]
            first, apart, count = self._tiles(length, WINDOW_TILE, part, parts)

            def step(index: Any, carried: Any) -> Any:
                token = (first + index * apart) * WINDOW_TILE
                refs = [each.at[row, head, pl.ds(token, WINDOW_TILE)] for each in (keys, values)]
                given = [exact, unused, carried, spread(length - token)]
                return run(plain.step, refs, given, (state,), simulated=self.simulated)[0]

            walked = lax.fori_loop(0, count, step, nothing)
        coded, sums, start = run(self.walk.begin, [queries], [], begun, simulated=self.simulated)
        return coded, sums, start if walked is None else walked
