"""Chains of W4A16 products whose kernels start while the one before ends: wall-clock microseconds a product, same bits.

    python benchmarks/dependent_launch.py --seconds 60

Each product reads what the one before wrote, so that nothing overlaps but what `DecodeConfig.early` allows: "launch"
starts a kernel's blocks when those before have begun to end, "weights" asks for the first weights in that time too.
Kernel times overlap then: what counts is the clock, of chains that read other weights each time, beyond the second
cache. bfloat16 by XLA is beside. Programs compile in processes of their own, which take turns on the GPU.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp

from pallas_kernels import grid
from pallas_kernels.cases import Case
from pallas_kernels.decode import DecodeConfig
from pallas_kernels.matmul import w4a16_matmul
from pallas_kernels.untried import untried

CHAINS: Final = {(8192, 8192): 12, (4096, 4096): 32}  # (outputs, inputs): products
SMALL: Final = 4096  # outputs, up to which blocks divide a tile's inputs
EARLY: Final = ("no", "launch", "weights")
ROUNDS: Final = 9
CALLS: Final = 12


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="begin nothing new after so long")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--instruction", choices=("warpgroup", "warp"), help="of one process alone")
    parser.add_argument("--chain", help="OUTPUTSxINPUTS, of one process alone")
    parser.add_argument("--turns", type=Path, help="file whose lock lets one process at a time measure")
    parser.add_argument("--lower", action="store_true", help="lower to CUDA alone, where there is no GPU")
    parser.add_argument("--output", type=Path, help="a file to add JSON lines to")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    lines = _of_processes(arguments, end) if arguments.chain is None else map(json.dumps, _rows(arguments, end))
    for line in lines:
        print(line, flush=True)
        if arguments.output is not None:
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _of_processes(arguments: argparse.Namespace, end: float) -> Iterator[str]:
    """Yields the rows of all chains, and what ran."""
    device, version = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.devices()[0].device_kind); print(jax.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    yield json.dumps({"device": device, "jax": version, "command": " ".join(["python", *sys.argv])})
    with tempfile.TemporaryDirectory() as folder:
        options = ["--tokens", str(arguments.tokens), "--turns", f"{folder}/turns"]
        options += ["--seconds", str(end - time.monotonic()), *(["--lower"] if arguments.lower else [])]
        commands = [
            [sys.executable, __file__, "--chain", f"{outputs}x{inputs}", "--instruction", instruction, *options]
            for outputs, inputs in CHAINS
            for instruction in ("warpgroup", "warp")
        ]
        yield from (line.strip() for line in grid.lines_of(commands, end) if line.startswith("{"))


def _rows(arguments: argparse.Namespace, end: float) -> Iterator[dict[str, Any]]:
    """Yields the rows of one chain."""
    outputs, inputs = (int(part) for part in arguments.chain.split("x"))
    case = Case("w4a16", arguments.tokens, outputs, inputs, inputs // 128)
    config = case.config()
    if arguments.instruction == "warp":
        config = untried(case, config)[0 if outputs > SMALL else -1]
    assert isinstance(config, DecodeConfig)
    count = CHAINS[outputs, inputs]
    x = jax.ShapeDtypeStruct((case.tokens, inputs), jnp.bfloat16)
    weight = jax.eval_shape(case.prepare, jax.eval_shape(lambda: case.operands(0)))
    configs = [dataclasses.replace(config, early=early) for early in EARLY]
    traced = [jax.jit(_chain(each)).trace(x, [weight] * count) for each in configs]
    if arguments.lower:
        for each, one in zip(configs, traced, strict=True):
            text = one.lower(lowering_platforms=("cuda",)).as_text()
            yield {"chain": arguments.chain, "config": dataclasses.asdict(each), "lowered": "mosaic_gpu" in text}
        return
    calls = [one.lower().compile() for one in traced]
    dense = jax.jit(_dense_chain).lower(x, [jax.ShapeDtypeStruct((outputs, inputs), jnp.bfloat16)] * count).compile()
    if time.monotonic() > end:
        return
    with grid.turn(arguments.turns):
        weights = [case.prepare(case.operands(seed)) for seed in range(count)]
        given = 0.05 * jax.random.normal(jax.random.key(9), x.shape, x.dtype)
        first = calls[0](given, weights)
        for each, call in zip(configs, calls, strict=True):
            found = call(given, weights)
            row: dict[str, Any] = {"chain": arguments.chain, "products": count, "config": dataclasses.asdict(each)}
            row |= {
                "as_without": bool(jnp.all(found == first)),
                "same_bits": bool(jnp.all(found == call(given, weights))),
            }
            yield row | _clock(call, given, weights)
        matrices = [
            0.01 * jax.random.normal(jax.random.key(seed), (outputs, inputs), jnp.bfloat16) for seed in range(count)
        ]
        yield {"chain": arguments.chain, "products": count, "config": "bfloat16"} | _clock(dense, given, matrices)


def _chain(config: DecodeConfig) -> Callable[[jax.Array, list[Any]], jax.Array]:
    """Returns products in a row, whose numbers grow some fivefold each."""
    product = jax.jit(functools.partial(w4a16_matmul, config=config))  # lowered once

    def chain(x: jax.Array, weights: list[Any]) -> jax.Array:
        for weight in weights:
            x = product(x, weight)
        return x

    return chain


def _dense_chain(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
    for weight in weights:
        x = jnp.dot(x, weight.T)
    return x


def _clock(call: Callable[..., Any], x: jax.Array, weights: list[Any]) -> dict[str, float]:
    """Returns microseconds of a product: the median and the least over rounds of calls that follow one another."""
    jax.block_until_ready(call(x, weights))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            found = call(x, weights)
        jax.block_until_ready(found)
        times.append((time.perf_counter() - start) * 1e6 / (CALLS * len(weights)))
    return {"microseconds": statistics.median(times), "least": min(times)}


if __name__ == "__main__":
    main()
