"""The gate of a block's MLP in one kernel, from the joined product of gate and up as it lies: no cut, no copy.

    y = silu(gate) * up        joined = [gate | up],  silu(g) = g / (1 + exp(-g))

In bfloat16, every operation rounded, as XLA does it from `jax.nn.silu(gate) * up`: rounding once instead would be half
the error, and not what a model says elsewhere. A block of one warpgroup makes 1024 numbers. Of few rows, further blocks
ask for the weight of the product that reads y: see `ahead`.
"""

import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16, Int

from pallas_kernels import compat
from pallas_kernels.ahead import blocks_that_ask, work_or_ask

MULTIPLE: Final = compat.THREADS * compat.RUN_OF_ROW  # numbers of a block


def gate_fault(numbers: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Returns why the kernel does not take a joined product; None where it does.

    Args:
      numbers: of a row of the result.
      dtype: of the product.

    >>> gate_fault(14336, jnp.bfloat16), gate_fault(1536, jnp.bfloat16)
    (None, 'rows of 1536 numbers, the kernel takes multiples of 1024')
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"{jnp.dtype(dtype)} rows, the kernel takes bfloat16"
    if numbers % MULTIPLE:
        return f"rows of {numbers} numbers, the kernel takes multiples of {MULTIPLE}"
    return None


def apply_gate(
    joined: BFloat16[Array, "rows both"],
    *,
    ahead: Int[Array, "out in"] | None = None,
    simulate: compat.Simulation | None = None,
) -> BFloat16[Array, "rows n"]:
    """Returns silu(gate) * up: `reference.apply_gate`, but for exp and the division, which are a GPU's approximations.

    Args:
      joined: gate, then up, each [rows, n].
      ahead: codes of the weight that the next product reads, to ask for their first bytes; None for nothing.
      simulate: run in the interpreter on the CPU with these settings; None on an H100 or H200.

    Raises:
      ValueError: the kernel does not take such rows.
    """
    rows, both = joined.shape
    numbers = both // 2
    fault = gate_fault(numbers, joined.dtype)
    if fault is not None:
        raise ValueError(f"{fault}; let XLA make the gate")
    codes, blocks = blocks_that_ask(ahead, rows, simulate)
    given = {"joined": joined} | codes
    working = rows * (numbers // MULTIPLE)
    call = compat.kernel(
        functools.partial(_body, (working, numbers), (*given, "out"), simulated=simulate is not None),
        out=jax.ShapeDtypeStruct((rows, numbers), jnp.bfloat16),
        scratch={},
        grid={"part": working + blocks},
        simulate=simulate,
    )
    gated: jax.Array = call(*given.values())
    return gated


def _body(shape: tuple[int, int], names: tuple[str, ...], *references: Any, simulated: bool) -> None:
    """The program of 1024 numbers of a row, or that of a block that asks for what comes next."""
    (working, numbers), part = shape, lax.axis_index("part")
    gmem = dict(zip(names, references, strict=True))
    layout, parts = compat.strided(MULTIPLE), numbers // MULTIPLE

    def work() -> None:
        row, start = lax.div(part, parts), lax.rem(part, parts) * MULTIPLE
        gate, up = (
            compat.load(gmem["joined"].at[row, pl.ds(first, MULTIPLE)], layout, checked=False).astype(jnp.float32)
            for first in (start, start + numbers)
        )
        grown = compat.rounded(jnp.exp(-gate), simulated=simulated)
        share = compat.rounded(1 / compat.rounded(grown + 1, simulated=simulated), simulated=simulated)
        silu = compat.rounded(gate * share, simulated=simulated)
        gmem["out"].at[row, pl.ds(start, MULTIPLE)][...] = (silu * up).astype(jnp.bfloat16)

    work_or_ask(gmem, part, working, work)
