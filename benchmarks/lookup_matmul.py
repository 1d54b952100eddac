"""Time of binary codes times a few activations: tables of partial sums beside the dense rule, on this machine.

    python benchmarks/lookup_matmul.py [--inputs 4096] [--outputs 4096] [--group 128]

Prints one JSON line for each width and number of rows: of both rules the median processor time of all threads, least
and median wall time, and the memory of intermediate arrays; and the largest difference of the products, relative to the
largest product. Where other work runs, wall times favour the shorter rule, which fits into one slice of the scheduler:
compare processor times then. The load average stands in each line. `jquant.matmul.LOOKUP_ROWS` comes from here.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp

from jquant.formats import BinaryFormat, BinaryTensor, quantize_binary
from jquant.matmul import dense, lookup_matmul

REPEATS = 15

type Rule = Callable[[jax.Array, BinaryTensor], jax.Array]


def main() -> None:
    """Runs all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--group", type=int, default=128)
    arguments = parser.parse_args()
    for bits in (2, 3, 4):
        weight = random_weight(arguments.inputs, arguments.outputs, BinaryFormat(bits, arguments.group))
        for rows in (1, 2, 4, 8):
            x = jax.random.normal(jax.random.key(1), (rows, arguments.inputs))
            rules = {"lookup": lookup_matmul, "dense": multiply_dense}
            case = {"device": jax.devices()[0].device_kind, "shape": weight.shape, "bits": bits, "rows": rows}
            case |= {"load": round(os.getloadavg()[0], 1), "difference": difference(rules, x, weight)}
            print(json.dumps(case | measure(rules, x, weight)), flush=True)


def random_weight(inputs: int, outputs: int, format: BinaryFormat) -> BinaryTensor:
    """Returns random signs with random alphas."""
    first, second = jax.random.split(jax.random.key(0))
    codes = jax.random.randint(first, (inputs, outputs), 0, 2**format.bits).astype(jnp.uint8)
    alphas = jax.random.uniform(second, (format.bits, format.groups(inputs), outputs))
    return jax.jit(partial(quantize_binary, offsets=None, format=format))(codes, alphas)


def multiply_dense(x: jax.Array, weight: BinaryTensor) -> jax.Array:
    """Multiplies as the dense rule does."""
    return x @ dense(weight, x.dtype)


def measure(rules: Mapping[str, Rule], x: jax.Array, weight: BinaryTensor) -> dict[str, dict[str, float]]:
    """Returns the times of each compiled rule, run in turns, and the memory of its intermediate arrays."""
    compiled = {name: jax.jit(rule).lower(x, weight).compile() for name, rule in rules.items()}
    wall: dict[str, list[float]] = {name: [] for name in rules}
    processor: dict[str, list[float]] = {name: [] for name in rules}
    for repeat in range(1 + REPEATS):
        for name, rule in compiled.items():
            started, worked = time.perf_counter(), time.process_time()
            rule(x, weight).block_until_ready()
            if repeat:  # the first turn warms up
                processor[name].append(1e3 * (time.process_time() - worked))
                wall[name].append(1e3 * (time.perf_counter() - started))
    return {
        name: {
            "processor_ms": round(statistics.median(processor[name]), 1),
            "least_ms": round(min(wall[name]), 1),
            "median_ms": round(statistics.median(wall[name]), 1),
            "temporary_MB": round(temporary_bytes(rule) / 1e6, 1),
        }
        for name, rule in compiled.items()
    }


def temporary_bytes(rule: jax.stages.Compiled) -> float:
    """Returns the memory that a program takes beside its arguments and its result; not a number if it cannot say."""
    analysis = rule.memory_analysis()
    return float("nan") if analysis is None else analysis.temp_size_in_bytes


def difference(rules: Mapping[str, Rule], x: jax.Array, weight: BinaryTensor) -> float:
    """Returns the largest difference of two rules' products, relative to the largest product."""
    one, other = (jax.jit(rule)(x, weight) for rule in rules.values())
    return float(jnp.abs(one - other).max() / jnp.abs(other).max())


if __name__ == "__main__":
    main()
