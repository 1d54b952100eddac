"""The sum of the residual stream and an update, and its RMS norm, in one kernel: what lies between two matrix products.

    sum = x + update        y = scale * sum / sqrt(mean(sum^2) + eps)

A block of one warpgroup makes one row, which its threads hold in registers: x is read once, sum and y are written once.
XLA makes two kernels of it, and both read all.
"""

import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16

from pallas_kernels import compat

MULTIPLE: Final = 128 * compat.RUN_OF_ROW  # numbers of a row: runs of 16 bytes for each of 128 threads
MOST: Final = 8 * MULTIPLE  # that a warpgroup's registers hold
REDUCTION_BYTES: Final = 4 * 32  # of a sum over four warps, with room


def norm_fault(numbers: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Returns why the kernel does not take rows; None where it does.

    >>> norm_fault(4096, jnp.bfloat16), norm_fault(576, jnp.bfloat16)
    (None, 'rows of 576 numbers, the kernel takes multiples of 1024 up to 8192')
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"{jnp.dtype(dtype)} rows, the kernel takes bfloat16"
    if numbers % MULTIPLE or numbers > MOST:
        return f"rows of {numbers} numbers, the kernel takes multiples of {MULTIPLE} up to {MOST}"
    return None


def add_norm(
    x: BFloat16[Array, "rows n"],
    update: BFloat16[Array, "rows n"] | None,
    scale: BFloat16[Array, "n"],
    *,
    eps: float,
    simulate: compat.Simulation | None = None,
) -> tuple[BFloat16[Array, "rows n"], BFloat16[Array, "rows n"]]:
    """Returns the sum and its norm: `reference.add_norm`, but for the order of the mean's sums.

    Args:
      x: the residual stream.
      update: what is added to it; None for nothing.
      scale: of the norm.
      eps: added to the mean of squares.
      simulate: run in the interpreter on the CPU with these settings; None on an H100 or H200.

    Raises:
      ValueError: the kernel does not take such rows.
    """
    rows, numbers = x.shape
    fault = norm_fault(numbers, x.dtype)
    if fault is not None:
        raise ValueError(f"{fault}; let XLA make the norm")
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    given = [x, scale] if update is None else [x, update, scale]
    call = compat.kernel(
        functools.partial(_body, numbers, eps),
        out=(out,) if update is None else (out, out),
        scratch={},
        grid={"row": rows},
        reduction_bytes=REDUCTION_BYTES,
        simulate=simulate,
    )
    *sums, normed = call(*given)
    return (sums[0] if sums else x), normed


def _body(numbers: int, eps: float, *references: Any) -> None:
    """One row's program: x, then the update if there is one, the scale, then the sum if there is an update, and y."""
    row, layout, added = lax.axis_index("row"), compat.strided(numbers), len(references) == 5
    x_gmem, *others = references
    sums = compat.load(x_gmem.at[row], layout, checked=False)
    if added:
        sums = sums + compat.load(others.pop(0).at[row], layout, checked=False)
    scale = compat.load(others.pop(0), layout, checked=False)
    if added:
        others.pop(0)[row] = sums
    wide = sums.astype(jnp.float32)
    mean = jnp.sum(wide * wide) * jnp.float32(1 / numbers)
    others.pop(0)[row] = (wide * lax.rsqrt(mean + jnp.float32(eps))).astype(jnp.bfloat16) * scale
