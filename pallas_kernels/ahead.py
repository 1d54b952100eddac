"""Bytes of the weight that is multiplied next, asked for by a kernel before it: a hint to the memory, no result.

Of few rows a kernel between two products leaves most multiprocessors idle, and the memory too. Further blocks of its
grid ask for the first bytes of the next weight's codes, which come into the second level's cache while the kernel ends
and the product begins. Likewise a product whose own weight is all under way: nothing else is read until its last sums
are stored and the next kernel has begun.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from pallas_kernels import compat, inline_step

BYTES: Final = 16 * 2**20  # that are asked for at most: 128 blocks
ROWS_THAT_LEAVE_ROOM: Final = 64


def blocks_that_ask(
    codes: Int[Array, "out in"] | None, rows: int, simulate: compat.Simulation | None
) -> tuple[dict[str, Int[Array, "out in"]], int]:
    """Returns the codes as a kernel's operand, by the name that `work_or_ask` looks for, and how many blocks ask.

    Args:
      codes: what the next product reads; None for nothing.
      rows: of the kernel's own work: beside more than 64, nothing is asked for.
      simulate: the interpreter, which has no cache, asks for nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> codes = jnp.zeros((1024, 1024), jnp.int4)  # 512 KB
      >>> blocks_that_ask(codes, 1, None)[1], blocks_that_ask(codes, 65, None)
      (4, ({}, 0))
    """
    if codes is None or simulate is not None or rows > ROWS_THAT_LEAVE_ROOM:
        return {}, 0
    blocks = min(BYTES, codes.size * compat.bits_of(codes.dtype) // 8) // inline_step.BYTES_OF_BLOCK
    return ({"codes": codes} if blocks else {}), blocks


def work_or_ask(gmem: Mapping[str, Any], block: Any, working: int, work: Callable[[], None]) -> None:
    """Does the kernel's own work in the first blocks, and asks for bytes of "codes", if there are any, in the others.

    Args:
      gmem: the kernel's references by name.
      block: index of this one.
      working: how many blocks have work.
      work: that of this block.
    """
    if "codes" not in gmem:
        work()
        return
    pl.when(block < working)(work)

    @pl.when(block >= working)
    def _() -> None:
        inline_step.ask_for(gmem["codes"], block - working)


def ask_from_last(codes: Any, unit: Any, units: int, asks: int) -> None:
    """Lets the last of some warpgroups ask for so many parts of an array, each for as many.

    Args:
      codes: a reference to it in the GPU's memory.
      unit: which warpgroup this is, in the order in which they begin.
      units: how many there are.
      asks: parts of `inline_step.BYTES_OF_BLOCK` to ask for.
    """
    each = -(-asks // units)
    first = units - -(-asks // each)
    for part in range(each):
        place = (unit - first) * each + part

        @pl.when((unit >= first) & (place < asks))
        def _(place: Any = place) -> None:
            inline_step.ask_for(codes, place)
