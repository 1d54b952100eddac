r"""One decode step of a model of a named shape, random codes by a recipe: kernels by name, and ways to loop over steps.

Prints the milliseconds of a token when the host calls each step without waiting, in a loop of known length, in a loop
that may end early, and in that loop recorded as a CUDA graph; and on a GPU the kernels of one step, summed by name.

    python benchmarks/decode_step.py [--recipe rtn-w4g128+kv4] [--batch 16] [--context 8000] [--layers 8]

docs/runtime.md quotes lines that drafts of this script printed.
"""

import argparse
import collections
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp

from jquant import models
from jquant.machines import Target
from jquant.models import SHAPES, Cache, Llama, abstract_llama, empty_cache, random_like, stack_layers
from jquant.plan import outline
from jquant.recipe import load_recipe
from jquant.runtime import GRAPHS
from jquant.targets import describe_products, prepare

STEPS: Final = 16
TILE: Final = 128  # tokens that a cache's capacity is a multiple of
GRAPH: Final[Mapping[str, Any]] = {  # XLA's default kinds, and loops
    "xla_gpu_enable_command_buffer": f"{GRAPHS},WHILE,CONDITIONAL",
    "xla_gpu_graph_min_graph_size": 1,
}


def main() -> None:
    """Prints a JSON line for each way."""
    arguments = _arguments()
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, **vars(arguments)}), flush=True)
    model = _model(arguments)
    print(json.dumps({"products": describe_products(model)}), flush=True)
    tokens = jnp.ones(arguments.batch, jnp.int32)
    capacity = -(-(arguments.context + 6 * STEPS) // TILE) * TILE
    shapes = jax.eval_shape(lambda: empty_cache(model, arguments.batch, capacity))

    def cache() -> Cache:
        filled = random_like(shapes, jax.random.key(0))
        return dataclasses.replace(filled, positions=jnp.full(arguments.batch, arguments.context, jnp.int32))

    ways: dict[str, tuple[Callable[..., Any], Mapping[str, Any]]] = {
        "a call a token, not waited for": (_one, {}),
        f"a loop of {STEPS}": (_scan, {}),
        "a loop that may end early": (_while, {}),
        "the same in a CUDA graph": (_while, GRAPH),
    }
    for name, (function, options) in ways.items():
        print(json.dumps({"way": name, **_time(function, options, model, tokens, cache())}), flush=True)
    if jax.default_backend() == "gpu":
        print(json.dumps(_kernels(model, tokens, cache())), flush=True)


def _time(
    function: Callable[..., Any], options: Mapping[str, Any], model: Llama, tokens: jax.Array, cache: Cache
) -> dict[str, float]:
    started = time.monotonic()
    program = jax.jit(function, donate_argnums=2).lower(model, tokens, cache).compile(compiler_options=dict(options))
    compiled, calls = time.monotonic() - started, STEPS if function is _one else 1
    times = []
    for _ in range(4):
        started = time.monotonic()
        for _ in range(calls):
            tokens, cache = program(model, tokens, cache)
        jax.device_get(tokens)
        times.append((time.monotonic() - started) / STEPS)
    return {"ms": round(1e3 * statistics.median(times[1:]), 3), "compile_s": round(compiled, 1)}


def _one(model: Llama, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    logits, cache = models.decode(model, tokens, cache)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache


def _scan(model: Llama, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    return jax.lax.fori_loop(0, STEPS, lambda _, now: _one(model, *now), (tokens, cache))


def _while(model: Llama, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    def running(state: tuple[jax.Array, Cache, jax.Array]) -> jax.Array:
        return (state[2] < STEPS) & jnp.any(state[0] >= 0)  # never ends early, which XLA does not know

    def step(state: tuple[jax.Array, Cache, jax.Array]) -> tuple[jax.Array, Cache, jax.Array]:
        return *_one(model, *state[:2]), state[2] + 1

    return jax.lax.while_loop(running, step, (tokens, cache, jnp.int32(0)))[:2]


def _kernels(model: Llama, tokens: jax.Array, cache: Cache) -> dict[str, Any]:
    """Returns count and microseconds of a step's kernels by name, the longest first; CUPTI's, through Pallas."""
    from jax._src.lib import mosaic_gpu

    library: Any = vars(mosaic_gpu)["_mosaic_gpu_ext"]
    run = jax.jit(_one, donate_argnums=2)
    tokens, cache = jax.block_until_ready(run(model, tokens, cache))
    library._cupti_init()
    try:
        jax.block_until_ready(run(model, tokens, cache))
    finally:
        found = library._cupti_get_timings(True)
    sums: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for name, milliseconds in found:
        sums[name] = [sums[name][0] + 1, sums[name][1] + 1e3 * milliseconds]
    ranked = sorted(sums.items(), key=lambda item: -item[1][1])
    return {"kernels": len(found), "us": sum(us for _, us in sums.values()), "by_name": dict(ranked)}


def _model(arguments: argparse.Namespace) -> Llama:
    config = dataclasses.replace(SHAPES[arguments.shape], num_hidden_layers=arguments.layers)
    model = abstract_llama(config, "bfloat16")
    for name in filter(None, arguments.recipe.split("+")):
        model = outline(model, load_recipe(name))
    model = random_like(model, jax.random.key(0))
    model = prepare(stack_layers(model) if arguments.stacked else model, Target(arguments.target))
    return jax.block_until_ready(model)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--recipe", default="rtn-w4g128", help='several are joined by "+"; "" for bfloat16')
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--stacked", action="store_true")
    parser.add_argument("--target", choices=[target.value for target in Target], default=Target.H100.value)
    return parser.parse_args()


if __name__ == "__main__":
    main()
