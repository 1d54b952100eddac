"""The sum of the float32 residual stream and an update, and its norm, in one kernel: what lies between two products.

    sum = x + update        y = scale * sum / sqrt(mean(sum^2) + eps)

A block of one warpgroup makes one row, which its threads hold in registers: x is read once, sum and y are written once.
XLA makes two kernels of it, and both read all.
"""

import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float32

from pallas_kernels import compat

MULTIPLE: Final = compat.THREADS * compat.RUN_OF_ROW  # numbers of a row: runs of 8 for each of 128 threads
MOST: Final = 8 * MULTIPLE  # that a warpgroup's registers hold
REDUCTION_BYTES: Final = 4 * 32  # of a sum over four warps, with room


def norm_fault(numbers: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Returns why the kernel does not take rows; None where it does.

    >>> norm_fault(4096, jnp.float32), norm_fault(576, jnp.float32)
    (None, 'rows of 576 numbers, the kernel takes multiples of 1024 up to 8192')
    """
    if jnp.dtype(dtype) != jnp.float32:
        return f"{jnp.dtype(dtype)} rows, the kernel takes float32"
    if numbers % MULTIPLE or numbers > MOST:
        return f"rows of {numbers} numbers, the kernel takes multiples of {MULTIPLE} up to {MOST}"
    return None


def add_norm(
    x: Float32[Array, "rows n"],
    update: BFloat16[Array, "rows n"] | None,
    scale: BFloat16[Array, "n"],
    *,
    eps: float,
    simulate: compat.Simulation | None = None,
) -> tuple[Float32[Array, "rows n"], BFloat16[Array, "rows n"]]:
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
    dtypes = {"normed": jnp.bfloat16, "sum": jnp.float32}
    given = {"x": x, "scale": scale} | ({} if update is None else {"update": update})
    made = ("normed",) if update is None else ("normed", "sum")
    call = compat.kernel(
        functools.partial(_body, numbers, eps, (*given, *made)),
        out=tuple(jax.ShapeDtypeStruct(x.shape, dtypes[name]) for name in made),
        scratch={},
        grid={"row": rows},
        reduction_bytes=REDUCTION_BYTES,
        simulate=simulate,
    )
    normed, *sums = call(*given.values())
    return (sums[0] if sums else x), normed


def _body(numbers: int, eps: float, names: tuple[str, ...], *references: Any) -> None:
    """A row's program; the references have names."""
    row, layout = lax.axis_index("row"), compat.strided(numbers)
    gmem = dict(zip(names, references, strict=True))
    sums = compat.load(gmem["x"].at[row], layout, checked=False)
    if "update" in gmem:
        sums = sums + compat.load(gmem["update"].at[row], layout, checked=False).astype(jnp.float32)
        gmem["sum"][row] = sums
    scale = compat.load(gmem["scale"], layout, checked=False).astype(jnp.float32)
    mean = jnp.sum(sums * sums) * jnp.float32(1 / numbers)
    gmem["normed"][row] = (sums * lax.rsqrt(mean + jnp.float32(eps)) * scale).astype(jnp.bfloat16)
