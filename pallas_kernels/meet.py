"""Where sums over ranges of inputs meet: those of a block's warpgroups, then those of a cluster's blocks.

    warpgroups 1.. -> shared memory -> warpgroup 0 adds them in order -> blocks 1.. of a cluster -> block 0
    -> adds them in order -> goes on alone

No order of additions depends on time.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import compat


def scratch(rows: int, columns: int, warpgroups: int, peers: int) -> dict[str, Any]:
    """Returns the shared memory and barriers for float32 sums [rows, columns], by the names of a body's arguments.

    Args:
      rows: of a block's sums.
      columns: likewise.
      warpgroups: of a block.
      peers: blocks of a cluster whose sums meet; 1 where none do.
    """
    found: dict[str, Any] = {}
    if warpgroups > 1:
        found["sums_smem"] = compat.SharedMemory((warpgroups - 1, rows, columns), jnp.float32)
        found["summed"] = compat.Barrier(num_arrivals=warpgroups - 1)
    if peers > 1:
        tiles = compat.tiled(columns, jnp.float32)
        found["far_smem"] = compat.SharedMemory((peers - 1, rows, columns), jnp.float32, transforms=tiles)
        found["landed"] = compat.Barrier(num_arrivals=peers - 1)
    return found


def across_warpgroups(
    sums: Any, warpgroup: Any, count: int, memory: dict[str, Any], go_on: Callable[[Any], None]
) -> None:
    """Calls `go_on` with the sum over the warpgroups, in the first of them alone."""
    if count == 1:
        go_on(sums)
        return

    @pl.when(warpgroup > 0)
    def _() -> None:
        memory["sums_smem"][warpgroup - 1] = sums
        compat.commit()
        compat.arrive(memory["summed"])

    @pl.when(warpgroup == 0)
    def _() -> None:
        compat.wait(memory["summed"])
        total = sums
        for other in range(count - 1):
            total = total + compat.load(memory["sums_smem"].at[other], compat.C, checked=False)
        go_on(total)


def across_cluster(sums: Any, split: Any, peers: int, memory: dict[str, Any], go_on: Callable[[Any], None]) -> None:
    """Calls `go_on` with the sum over the blocks along "split", in the first of them alone."""
    if peers == 1:
        go_on(sums)
        return
    far, landed = memory["far_smem"], memory["landed"]

    @pl.when(split > 0)
    def _() -> None:
        compat.send(sums, far.at[split - 1], landed, cluster_idx=jnp.int32(0), cluster_dim="split")

    @pl.when(split == 0)
    def _() -> None:
        compat.wait(landed)
        total = sums
        for other in range(peers - 1):
            total = total + compat.load(far.at[other], compat.C, checked=False)
        go_on(total)
