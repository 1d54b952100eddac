"""What the kernels of few tokens share: their launch, the copies ahead of each warpgroup, and where sums meet.

    warpgroup: copies of `stages` steps -> a step's products -> the copy of `stages` steps later -> .. -> its sum

    warpgroups 1.. -> shared memory -> warpgroup 0 adds them in order -> blocks 1.. of a cluster -> block 0
    -> adds them in order -> goes on alone

No order of additions depends on time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Shaped

from pallas_kernels import compat


def clustered(config: Any, simulate: compat.Simulation | None) -> bool:
    """Tells whether the splits of a `DecodeConfig` meet in a cluster: the interpreter has no copies between blocks."""
    return bool(config.cluster and config.splits > 1 and simulate is None)


def pad_rows(x: Shaped[Array, "tokens columns"], rows: int) -> Shaped[Array, "rows columns"]:
    """Returns an array filled up with rows of zeros.

    >>> pad_rows(jnp.ones((1, 2)), 2).tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """
    return x if x.shape[0] == rows else jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))


def launch(
    kernel: Any,
    given: list[Any],
    tokens: int,
    outputs: int,
    scratch_of: Callable[[Any], dict[str, Any]],
    simulate: compat.Simulation | None,
    beside: tuple[jax.ShapeDtypeStruct, ...] = (),
    reduction_bytes: int = 0,
    halves: int = 1,
) -> tuple[Float[Array, "rows columns"], ...]:
    """Runs a kernel on a grid of tiles and splits; returns [tokens, out], the splits added in it or by XLA.

    Args:
      kernel: with `config`, `clustered`, `by_step` (it has barriers of its own) and `body`.
      given: its arrays.
      tokens: rows that it stores.
      outputs: of the weight.
      scratch_of: its shared memory, by the dtype that it stores.
      simulate: run in the interpreter on the CPU with these settings.
      beside: what else it stores, where the splits do not meet in XLA; returned behind the product.
      reduction_bytes: of the scratch memory of reductions, which one warpgroup of a block alone may make.
      halves: rows of the weight of which it stores one number: 2 of a gate and up.
    """
    config = kernel.config
    in_xla = config.splits > 1 and not kernel.clustered
    shape, dtype = (config.splits if in_xla else 1, tokens, outputs // halves), jnp.float32 if in_xla else jnp.bfloat16
    splits, tiles = {"split": config.splits}, {"tile": outputs // config.rows}
    parts, *others = compat.kernel(
        kernel.body,
        out=(jax.ShapeDtypeStruct(shape, dtype), *beside),
        scratch=scratch_of(dtype),
        grid=tiles if kernel.clustered else tiles | splits,
        cluster=splits if kernel.clustered else None,
        warpgroups=config.warpgroups,
        manual_barriers=kernel.by_step,
        reduction_bytes=reduction_bytes,
        simulate=simulate,
    )(*given)
    return (parts.sum(0).astype(jnp.bfloat16) if in_xla else parts[0], *others)


def walk(
    kernel: Any, fetch: Callable[[Any, Any], None], add: Callable[[Any, Any], Any], begun: Callable[[], Any], full: Any
) -> Any:
    """Returns a warpgroup's sum over its steps, each copied `stages` steps before it is added.

    Args:
      kernel: with `steps`, `stages` and `by_step`.
      fetch: starts the copies of a step into a slot.
      add: returns the sum and the products of a slot.
      begun: returns the first sum, while the first copies are under way.
      full: the warpgroup's barriers, one for each slot.
    """
    for slot in range(kernel.stages):
        fetch(slot, slot)

    def step(index: Any, sum_: Any) -> Any:
        slot = lax.rem(index, kernel.stages)
        compat.wait(full(slot))
        sum_ = add(sum_, slot)

        @pl.when(index + kernel.stages < kernel.steps)
        def _() -> None:
            if kernel.by_step:
                compat.commit()
            fetch(index + kernel.stages, slot)

        return sum_

    return lax.fori_loop(0, kernel.steps, step, begun())


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
