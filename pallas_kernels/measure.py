"""What a benchmark measures with: kernel times by CUPTI, and the rates of this GPU that products are compared with."""

import math
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.cases import FEW_TOKENS, Product

BEYOND_CACHE: Final = 120e6  # bytes of weights that one round reads; an H100's second cache holds 50 MB
MOST_COPIES: Final = 16
ROUNDS: Final = 5
ATTEMPTS: Final = 3  # to count kernels while no other thread launches one


def kernel_microseconds(call: Product, sets: list[tuple[Any, ...]]) -> tuple[float, int]:
    """Returns the median microseconds of all GPU kernels of a call, and how many kernels there are."""
    calls = ROUNDS * len(sets)
    jax.block_until_ready([call(*arguments) for arguments in sets])
    for _ in range(ATTEMPTS):
        with compat.kernel_times() as times:
            for _ in range(ROUNDS):
                jax.block_until_ready([call(*arguments) for arguments in sets])
        each = len(times) // calls
        if each and len(times) % calls == 0:
            totals = sorted(sum(times[index * each : (index + 1) * each]) for index in range(calls))
            return totals[calls // 2], each
    return math.nan, 0


def copies(weight: float) -> int:
    """Returns how many weights of so many bytes a round reads.

    >>> copies(8e6), copies(1e9)
    (15, 2)
    """
    return max(2, min(MOST_COPIES, math.ceil(BEYOND_CACHE / weight)))


class Peaks:
    """The machine's peaks, each measured when it is first asked for and told to `say`."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._peaks: dict[str, float] = {}

    def copy_rate(self) -> float:
        """Returns the bandwidth of a copy in GB/s."""
        return self._peak("copy, GB/s")

    def compared(self, case: Any, microseconds: float, xla: dict[str, float]) -> dict[str, float]:
        """Returns a product's rate, its share of the peak and how often it is as fast as XLA.

        Args:
          case: the product.
          microseconds: its time.
          xla: those of XLA's formulations by name, bfloat16 among them; empty for no comparison.
        """
        if case.tokens <= FEW_TOKENS:
            rate, peak = case.bytes_of_codes / microseconds / 1e3, self.copy_rate()
        else:
            rate, peak = (
                case.operations / microseconds / 1e6,
                self._peak("bfloat16, T/s" if case.kind == "w4a16" else "int8, T/s"),
            )
        found = {"rate": rate, "peak": peak, "of_peak": rate / peak}
        if xla:
            found |= {"over_bf16": xla["bfloat16"] / microseconds, "over_best_xla": min(xla.values()) / microseconds}
        return found

    def _peak(self, name: str) -> float:
        if name not in self._peaks:
            size = 1 << 13
            if name.startswith("copy"):
                values = jnp.zeros(1 << 28, jnp.bfloat16)
                call: Any = jax.jit(lambda x: x + jnp.bfloat16(1))
                arguments: tuple[jax.Array, ...] = (values,)
                work = 2e-3 * values.nbytes
            else:
                dtype = jnp.bfloat16 if name.startswith("b") else jnp.int8
                result = jnp.bfloat16 if name.startswith("b") else jnp.int32
                values = jax.random.randint(jax.random.key(0), (size, size), -100, 100, jnp.int8).astype(dtype)

                def product(a: jax.Array, b: jax.Array) -> jax.Array:
                    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=result)

                call, arguments, work = jax.jit(product), (values, values), 2e-6 * size**3
            jax.block_until_ready(call(*arguments))
            self._peaks[name] = work / kernel_microseconds(call, [arguments])[0]
            self._say(f"peak: {name[:-5]:28s} {self._peaks[name]:8.0f} {name[-4:]}")
        return self._peaks[name]
