"""Time of binary codes times a few activations: tables of partial sums beside the dense rule, on this machine.

    python benchmarks/lookup_matmul.py [--inputs 4096] [--outputs 4096] [--group 128]

Prints one JSON line for each width and number of rows: least and median milliseconds of both rules, and the memory that
their intermediate arrays take. `jquant.matmul.LOOKUP_ROWS` comes from here.
"""

import argparse
import json
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
            times = measure({"lookup": lookup_matmul, "dense": multiply_dense}, x, weight)
            case = {"device": jax.devices()[0].device_kind, "shape": weight.shape, "bits": bits, "rows": rows}
            print(json.dumps(case | times))


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
    """Returns least and median time of each compiled rule, run in turns, and the memory of its intermediate arrays."""
    compiled = {name: jax.jit(rule).lower(x, weight).compile() for name, rule in rules.items()}
    times: dict[str, list[float]] = {name: [] for name in rules}
    for repeat in range(1 + REPEATS):
        for name, rule in compiled.items():
            started = time.perf_counter()
            rule(x, weight).block_until_ready()
            if repeat:  # the first turn warms up
                times[name].append(1e3 * (time.perf_counter() - started))
    return {
        name: {
            "least_ms": round(min(times[name]), 1),
            "median_ms": round(statistics.median(times[name]), 1),
            "temporary_MB": round(rule.memory_analysis().temp_size_in_bytes / 1e6, 1),
        }
        for name, rule in compiled.items()
    }


if __name__ == "__main__":
    main()
