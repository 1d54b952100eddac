"""What a benchmark measures with: kernel times by CUPTI, and the rates of this GPU that products are compared with."""

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.cases import FEW_TOKENS, Product

type Timed = tuple[Product, list[tuple[Any, ...]]]  # a call and its sets of arguments

BEYOND_CACHE: Final = 120e6  # bytes of weights that one round reads; an H100's second cache holds 50 MB
MOST_COPIES: Final = 16
ROUNDS: Final = 5
REST: Final = 0.3  # seconds before measuring: behind products of thousands of tokens the clock is lower for a while
ATTEMPTS: Final = 3  # to count kernels while no other thread launches one
WITHOUT_AUTOTUNING: Final[dict[str, Any]] = {  # compile options: XLA chooses without measuring, on the processor alone
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,  # untried, XLA's int8 products by Triton are wrong
}


def kernel_microseconds(call: Product, sets: list[tuple[Any, ...]]) -> tuple[float, int]:
    """Returns the median microseconds of all GPU kernels of a call, and how many kernels there are."""
    return each_microseconds([(call, sets)])[0]


def each_microseconds(calls: Sequence[Timed]) -> list[tuple[float, int]]:
    """Returns `kernel_microseconds` of several calls, of one session: to begin and to end one takes CUPTI long.

    Args:
      calls: each with its sets of arguments; a kernel that is theirs alone parts what was measured of one and the next.
    """
    part, one = jax.jit(jnp.cbrt), jnp.ones(())
    for call, sets in calls:
        jax.block_until_ready([call(*arguments) for arguments in sets])
    jax.block_until_ready(part(one))
    time.sleep(REST)
    found: list[tuple[float, int] | None] = [None] * len(calls)
    for _ in range(ATTEMPTS):
        with compat.kernel_times() as kernels:
            jax.block_until_ready(part(one))
            for call, sets in calls:
                for _ in range(1 + ROUNDS):
                    jax.block_until_ready([call(*arguments) for arguments in sets])
                jax.block_until_ready(part(one))
        parts = parted(kernels, len(calls))
        now = [median_of_calls(times, len(sets)) for times, (_, sets) in zip(parts, calls, strict=True)]
        found = [before or after for before, after in zip(found, now, strict=True)]
        if all(found):
            break
    return [each or (math.nan, 0) for each in found]


def parted(kernels: Sequence[tuple[str, float]], count: int) -> list[list[float]]:
    """Returns the times between the kernels named as the first is, empty ones if there are not `count` stretches.

    >>> parted([("part", 1.0), ("a", 2.0), ("b", 3.0), ("part", 1.0), ("a", 4.0), ("part", 1.0)], 2)
    [[2.0, 3.0], [4.0]]
    """
    places = [place for place, (name, _) in enumerate(kernels) if name == kernels[0][0]]
    if len(places) != count + 1 or places[-1] != len(kernels) - 1:
        return [[] for _ in range(count)]
    return [[time for _, time in kernels[first + 1 : last]] for first, last in itertools.pairwise(places)]


def median_of_calls(times: Sequence[float], sets: int) -> tuple[float, int] | None:
    """Returns the median of a call's kernels together and how many they are; None where calls have not as many each.

    Args:
      times: of the kernels of 1 + ROUNDS rounds over the sets of arguments, of which the first is left out.
      sets: how many sets.

    >>> median_of_calls([9.0, 9.0, *(1.0, 0.5) * ROUNDS], 1)
    (1.5, 2)
    """
    calls = (1 + ROUNDS) * sets
    each = len(times) // calls
    if not each or len(times) % calls:
        return None
    totals = sorted(sum(times[index * each : (index + 1) * each]) for index in range(sets, calls))
    return totals[len(totals) // 2], each


def copies(weight: float) -> int:
    """Returns how many weights of so many bytes a round reads.

    >>> copies(8e6), copies(1e9)
    (15, 2)
    """
    return max(2, min(MOST_COPIES, math.ceil(BEYOND_CACHE / weight)))


class Peaks:
    """The machine's peaks, each measured when it is first asked for and told to `say`."""

    def __init__(self, say: Callable[[str], None], shared: Path | None = None) -> None:
        """Takes what it is told by, and the file by which processes that take turns measure each peak once."""
        self._say, self._shared = say, shared
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
        if self._shared is not None and self._shared.exists():
            self._peaks |= json.loads(self._shared.read_text(encoding="utf-8"))
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
            if self._shared is not None:
                self._shared.write_text(json.dumps(self._peaks), encoding="utf-8")
            self._say(f"peak: {name[:-5]:28s} {self._peaks[name]:8.0f} {name[-4:]}")
        return self._peaks[name]
