"""How a block writes a row's new token before it attends: its last warpgroup, while first tiles are on their way.

    last warpgroup   asks for words of queries, keys, values and angles; begins its copies; RoPE, queries -> shared
                     memory, "turned"; codes -> cache, "kept"
    others           begin their copies; wait for "turned"

Two barriers, as all need the queries at once, and one of them the codes, when it asks for the tile that has them. Words
are asked for before the copies, which need the position: both come from the GPU's memory at the same time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels import compat
from pallas_kernels.lanes import Program
from pallas_kernels.lanes_gpu import run


class Writing(NamedTuple):
    """The programs that write the heads of one KV head, see `append.Append`.

    Attributes:
      load: returns words, from a row's numbers and angles.
      turn: returns words, from those, and stores queries.
      keep: stores key and value, from what `turn` returned.
      loaded: shape of what `load` returns.
      turned: shape of what `turn` returns.
    """

    load: Program
    turn: Program
    keep: Program
    loaded: tuple[int, int]
    turned: tuple[int, int]


class NewToken(NamedTuple):
    """One token of each row, to be turned, coded and written before it is attended to.

    Attributes:
      projected: queries, keys and values before RoPE.
      angles: of RoPE.
      positions: of the tokens.
      writing: what turns, codes and writes it.
      capacity: tokens that a row may have.
    """

    projected: BFloat16[Array, "rows numbers"]
    angles: Float32[Array, "rows dim"]
    positions: Int32[Array, "rows"]
    writing: Writing
    capacity: int


def scratch_to_write(share: int, dim: int) -> dict[str, Any]:
    """Returns what `write_new` needs, by the names of a body's arguments."""
    return {
        "queries_smem": compat.SharedMemory((share, dim), jnp.bfloat16),
        "turned": compat.Barrier(num_arrivals=1),
        "kept": compat.Barrier(num_arrivals=1),
    }


def write_new(
    writing: Writing,
    numbers: tuple[Any, Any],
    head: Any,
    around: Callable[[], tuple[list[Any], Any]],
    begin: Callable[[], None],
    memory: dict[str, Any],
    warpgroups: int,
    *,
    simulated: bool,
) -> None:
    """Begins all warpgroups' copies, has the last one, whose tiles are the fewest, write, and waits for the queries.

    Args:
      writing: the programs.
      numbers: references to a row's numbers before RoPE, and its angles.
      head: the KV head.
      around: returns references to a part of the cache, and the token's place in it.
      begin: asks for the first tiles.
      memory: has what `scratch_to_write` asked for.
      warpgroups: of the block.
      simulated: whether it runs in the interpreter.
    """
    loaded, turned = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in (writing.loaded, writing.turned))

    def write() -> None:
        (words,) = run(writing.load, numbers, [spread(head)], (loaded,), simulated=simulated)
        begin()
        queries = memory["queries_smem"]
        (words,) = run(writing.turn, [queries], [words, spread(head)], (turned,), 1, simulated=simulated)
        compat.commit()
        compat.arrive(memory["turned"])
        some, place = around()
        run(writing.keep, some, [words, spread(place), spread(head)], (), len(some), simulated=simulated)
        compat.commit()
        compat.arrive(memory["kept"])

    if warpgroups == 1:
        write()
    else:
        writes = lax.axis_index("wg") == warpgroups - 1
        pl.when(writes)(write)
        pl.when(jnp.logical_not(writes))(begin)
    compat.wait(memory["turned"])


def spread(number: Any) -> Any:
    """Returns a number in every thread's registers."""
    return compat.cast(jnp.full((64, 8), number, jnp.int32), compat.C)
