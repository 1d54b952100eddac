"""Programs compiled before they are used, several at the same time.

A cold run meets its programs one after another and each waits for its compiler: on an H100 92 of GPTQ's 151 seconds for
8 billion weights, on one core of 16. What a block will run is known before it runs (`BlockPass.programs`): it is traced
and lowered by the caller's thread, which Python allows one of, and compiled by others. Calls find the same programs
that they would have compiled, in JAX's own tables, so that no result depends on it.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import jax

MOST_COMPILERS: Final = 8  # a block has up to nine large programs; each takes some memory while it is compiled
FEWEST_CORES: Final = 4  # with fewer, compilers wait for each other: XLA's use more than one core themselves


def compilers() -> int:
    """Returns how many programs to compile at the same time on this machine; 0 to compile each when it is used.

    >>> 0 <= compilers() <= MOST_COMPILERS
    True
    """
    cores = len(os.sched_getaffinity(0))
    return 0 if cores < FEWEST_CORES else min(MOST_COMPILERS, cores)


def compile_ahead(programs: Iterable[jax.stages.Traced], threads: int) -> int:
    """Compiles programs, those that are compiled already at no cost, and returns how many they are.

    Args:
      programs: traced for the arguments with which they will be called.
      threads: that compile at the same time.

    Example:
      >>> double = jax.jit(lambda x: x + x)
      >>> compile_ahead([double.trace(jax.ShapeDtypeStruct((3,), "float32"))], threads=2)
      1
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting = {id(traced.jaxpr): (traced, pool.submit(traced.lower().compile)) for traced in programs}
    for _, one in waiting.values():
        one.result()
    return len(waiting)
