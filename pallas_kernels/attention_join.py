"""What adds results of decode attention: warpgroups of a block, and the splits of a head by a kernel of their own.

    block (row, head, split)   warpgroups 1.. -> shared memory -> warpgroup 0 joins
    block (row, head, piece)   a tile of each warp's numbers, of all splits -> join -> a piece of the result

No order of additions depends on time.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, flash
from pallas_kernels.lanes_gpu import run

type Write = Callable[..., Any]  # `flash.write` of some shape and order: a program that wants to know its `piece`

AT_ONCE: Final = 16  # pieces of results that a warpgroup adds at once


def scratch_to_join(warpgroups: int, dim: int) -> dict[str, Any]:
    """Returns what `join_warpgroups` needs, by the names of a body's arguments."""
    if warpgroups == 1:
        return {}
    return {
        "results_smem": compat.SharedMemory((warpgroups - 1, *flash.shape_of_result(dim)), jnp.float32),
        "told": compat.Barrier(num_arrivals=warpgroups - 1),
    }


def join_warpgroups(
    mine: Any, count: int, memory: dict[str, Any], go_on: Callable[[Any], None], *, simulated: bool
) -> None:
    """Calls `go_on` with the sum of all warpgroups' results, in the first of them alone.

    Args:
      mine: this warpgroup's result, `flash.shape_of_result`, of axis "wg".
      count: warpgroups of the block.
      memory: has what `scratch_to_join` asked for.
      go_on: takes the sum.
      simulated: whether it runs in the interpreter.
    """
    if count == 1:
        go_on(mine)
        return
    warpgroup = lax.axis_index("wg")

    @pl.when(warpgroup > 0)
    def _() -> None:
        memory["results_smem"][warpgroup - 1] = mine
        compat.commit()
        compat.arrive(memory["told"])

    @pl.when(warpgroup == 0)
    def _() -> None:
        compat.wait(memory["told"])
        results, out = memory["results_smem"], jax.ShapeDtypeStruct(mine.shape, jnp.float32)
        others = [compat.load(results.at[other], compat.C, checked=False) for other in range(count - 1)]
        go_on(run(flash.join, [], [mine, *others], (out,), simulated=simulated)[0])


@dataclass(frozen=True)
class Joiner:
    """The program that adds a piece of all splits of one KV head: a tile of each warp's numbers.

    Attributes:
      splits: of the head.
      dim: numbers of a head.
      write: what stores a piece.
      simulated: whether it runs in the interpreter.
    """

    splits: int
    dim: int
    write: Write
    simulated: bool

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
        for start in range(0, self.splits, AT_ONCE):
            for index in range(start, min(self.splits, start + AT_ONCE)):
                for first in (piece, self.pieces):
                    some = parts.at[index, :, pl.ds(first * tile, tile)]
                    whole.append(compat.load(some, compat.C, checked=False))
            whole = list(run(flash.join_pieces, [], whole, (both,), simulated=self.simulated))
        program = functools.partial(self.write, piece=(piece, self.pieces))
        run(program, [out_gmem.at[row, head]], whole, (), 1, simulated=self.simulated)
