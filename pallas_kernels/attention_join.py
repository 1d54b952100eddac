"""What adds results of decode attention: warpgroups of a block, and the splits of a head by a kernel of their own.

    block (row, head)          warpgroups share the parts of the splits -> join -> the result
    block (row, head, piece)   a tile of each warp's numbers, of all splits -> join -> a piece of the result

No order of additions depends on time.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, flash
from pallas_kernels.lanes_gpu import run

type Write = Callable[..., Any]  # `flash.write` of some shape and order: a program that wants to know its `piece`

JOINERS: Final = (4, 2, 1)  # warpgroups that add splits, each as many
AT_ONCE: Final = 8  # results that a warpgroup adds at once
PIECES_AT_ONCE: Final = 16  # likewise pieces of results


def scratch_to_join(warpgroups: int, dim: int) -> dict[str, Any]:
    """Returns what `join_warpgroups` needs, by the names of a body's arguments."""
    if warpgroups == 1:
        return {}
    return {
        "results_smem": compat.SharedMemory((warpgroups - 1, *flash.shape_of_result(dim)), jnp.float32),
        "told": compat.Barrier(num_arrivals=warpgroups - 1),
    }


def join_warpgroups(
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
    dim: int
    write: Write
    simulated: bool

    @property
    def blocks(self) -> dict[str, int]:
        """Returns how many blocks a head has, by axis: one."""
        return {}

    def body(self, parts_gmem: Any, *rest: Any, **memory: Any) -> None:
        """One block's program."""
        *extras, out_gmem = rest
        row, head, warpgroup = (lax.axis_index(name) for name in ("row", "head", "wg"))
        out = jax.ShapeDtypeStruct(flash.shape_of_result(self.dim), jnp.float32)

        def load(ref: Any, index: Any) -> Any:
            return compat.load(ref.at[row, head, index], compat.C, checked=False)

        mine: list[Any] = []
        for start in range(0, self.each, AT_ONCE):
            some = range(start, min(self.each, start + AT_ONCE))
            mine += [load(parts_gmem, warpgroup * self.each + index) for index in some]
            mine = list(run(flash.join, [], mine, (out,), simulated=self.simulated))
        others = [load(extra, index) for extra in extras for index in range(extra.shape[2])]
        program, target = functools.partial(self.write, piece=(0, 1)), out_gmem.at[row, head]

        def write(whole: Any) -> None:
            run(program, [target], [whole], (), 1, simulated=self.simulated)

        join_warpgroups(mine[0], others, self.warpgroups, memory, write, simulated=self.simulated)


@dataclass(frozen=True)
class _PieceJoiner:
    """The program that adds a piece of all splits of one KV head: a tile of each warp's numbers."""

    splits: int
    dim: int
    write: Write
    simulated: bool
    warpgroups: int = 1

    @property
    def pieces(self) -> int:
        """Returns how many pieces there are."""
        return flash.shape_of_result(self.dim)[1] // flash.HEADS - 1

    @property
    def blocks(self) -> dict[str, int]:
        """Returns how many blocks a head has, by axis: simulated, one, as what it stores would replace the rest."""
        return {} if self.simulated else {"piece": self.pieces}

    def body(self, parts_gmem: Any, out_gmem: Any) -> None:
        """One block's program; simulated, that of all pieces of a head."""
        for piece in range(self.pieces):
            join = functools.partial(self._join, piece, parts_gmem, out_gmem)
            if self.simulated:
                join()
            else:
                pl.when(lax.axis_index("piece") == piece)(join)

    def _join(self, piece: int, parts_gmem: Any, out_gmem: Any) -> None:
        row, head = lax.axis_index("row"), lax.axis_index("head")
        parts, tile = parts_gmem.at[row, head], flash.HEADS
        both = jax.ShapeDtypeStruct((64, 2 * tile), jnp.float32)
        whole: list[Any] = []
        for start in range(0, self.splits, PIECES_AT_ONCE):
            for index in range(start, min(self.splits, start + PIECES_AT_ONCE)):
                for first in (piece, self.pieces):
                    some = parts.at[index, :, pl.ds(first * tile, tile)]
                    whole.append(compat.load(some, compat.C, checked=False))
            whole = list(run(flash.join_pieces, [], whole, (both,), simulated=self.simulated))
        program = functools.partial(self.write, piece=(piece, self.pieces))
        run(program, [out_gmem.at[row, head]], whole, (), 1, simulated=self.simulated)


def joiner(
    splits: int, dim: int, write: Write, way: Literal["by heads", "by pieces"], *, simulated: bool
) -> _Joiner | _PieceJoiner:
    """Returns the program that adds all splits of a head: in one block, or each piece in a block of its own."""
    if way == "by pieces":
        return _PieceJoiner(splits, dim, write, simulated)
    warpgroups = next(count for count in JOINERS if splits % count == 0)
    return _Joiner(splits // warpgroups, warpgroups, dim, write, simulated)
