r"""How long a recipe takes to quantize a model of a named shape: random bfloat16 weights, random windows, cold.

Runs what `jquant quantize` runs between reading the model and saving it (`jquant.passes.run_passes`). Prints JSON lines
as they come: each program that takes a second to compile, each block with the seconds of its phases, the programs that
were compiled, the phases of the first block and of the mean of the others, and the sum for the model's whole depth,
which is extrapolated from the last block where fewer layers were asked for or the time ran out. With `--parts` it then
times the parts of one more block apart: what collects statistics (with the Hessian's sums by themselves), factors,
solves, and advances; two or three more blocks' time, and what is compiled for it.

    python benchmarks/quantize_time.py [--recipe gptq-w4g128] [--layers 32] [--seconds 180] [--compilers 8]

Seconds of compilation are of all threads together, with more than one compiler more than passes by the clock.

docs/solvers.md quotes lines that this script printed.
"""

import argparse
import collections
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp

from jquant.blocks import SITES, QuantizeWeights
from jquant.blocks.weights import collect, solve_jointly
from jquant.calibration import compilers
from jquant.calibration.sequential import advance, dense_kernels
from jquant.formats import split_outputs
from jquant.models import SHAPES, Block, LlamaConfig, abstract_llama, blocks, embed, get, put, random_like
from jquant.numerics import inverse_factor
from jquant.passes import Context, Sequential, run_passes
from jquant.quantizers.statistics import HESSIAN
from jquant.recipe import load_recipe
from jquant.report import BlockReport

STARTED: Final = time.monotonic()
COMPILING: Final = "/jax/core/compile/"  # how JAX names what it reports of tracing, lowering and compiling
COMPILED: Final = f"{COMPILING}backend_compile_duration"
BYTES: Final = 1e9


class OutOfTime(Exception):
    """The limit that was given is reached."""


def main() -> None:
    """Prints JSON lines."""
    arguments = _arguments()
    compiled: dict[str, float] = collections.defaultdict(float)
    ends: list[float] = []  # of compilations, by the clock

    def count(event: str, duration_secs: float, **details: str | int) -> None:
        if event.startswith(COMPILING):
            compiled[str(details.get("fun_name"))] += duration_secs
        if event == COMPILED:
            ends.append(time.monotonic())
        if event == COMPILED and duration_secs >= 1.0:
            show(program=str(details.get("fun_name")), compiling=round(duration_secs, 1))

    jax.monitoring.register_event_duration_secs_listener(count)
    config = dataclasses.replace(SHAPES[arguments.shape], num_hidden_layers=arguments.layers)
    recipe = load_recipe(arguments.recipe)
    show(device=jax.devices()[0].device_kind, jax=jax.__version__, **vars(arguments))
    model = jax.block_until_ready(random_like(abstract_llama(config, "bfloat16"), jax.random.key(0)))
    shape = (arguments.samples, arguments.length)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size, jnp.int32)
    show(model="ready", seconds=round(time.monotonic() - STARTED, 1))

    before, began = dict(compiled), time.monotonic()
    times: list[float] = []
    phases: list[dict[str, float]] = []

    def on_block(report: BlockReport) -> None:
        now = time.monotonic() - began
        times.append(now - sum(times))
        own = {name: compiled[name] - before.get(name, 0.0) for name in compiled}
        show(
            block=report.index,
            seconds=round(times[-1], 2),
            compiling=round(sum(own.values()), 2),
            compiled_at=round(max(ends) - began, 1),
            programs=len(ends),
            phases={name: round(seconds, 3) for name, seconds in report.phases.items()},
        )
        phases.append(report.phases)
        if now > arguments.seconds:
            raise OutOfTime

    try:
        context = Context(jax.random.key(0), tokens, compilers=arguments.compilers, on_block=on_block)
        run_passes(recipe.passes, model, context)
    except OutOfTime:
        show(stopped=len(times))
    whole = time.monotonic() - began
    own = {name: compiled[name] - before.get(name, 0.0) for name in compiled}
    ranked = sorted(own.items(), key=lambda item: -item[1])
    show(
        compiled={name: round(seconds, 2) for name, seconds in ranked if seconds >= 0.1},
        all=round(sum(own.values()), 1),
    )
    _show_phases(times, phases)
    memory = jax.devices()[0].memory_stats() or {}
    depth, done = SHAPES[arguments.shape].num_hidden_layers, len(times)
    show(
        recipe=arguments.recipe,
        layers=done,
        seconds=round(whole, 1),
        depth=depth,
        seconds_of_depth=round(whole + (depth - done) * times[-1], 1),
        measured=done == depth,
        peak_gb=round(memory.get("peak_bytes_in_use", 0) / BYTES, 1),
    )
    if arguments.parts:
        quantize = next(one for step in recipe.passes if isinstance(step, Sequential) for one in step.passes)
        assert isinstance(quantize, QuantizeWeights)
        _parts(quantize, blocks(model)[0], embed(model, tokens), config, compiled)


def _show_phases(times: Sequence[float], phases: Sequence[Mapping[str, float]]) -> None:
    """Prints the seconds of each phase of the first block, and of the mean of those after it that advance."""
    between = slice(1, -1) if len(times) > 2 else slice(1, None)
    for which, own in ("first block", slice(1)), ("mean of the others", between):
        if seconds := times[own]:
            mean = {name: sum(each[name] for each in phases[own]) / len(seconds) for name in phases[own][0]}
            rest = sum(seconds) / len(seconds) - sum(mean.values())
            show(phases_of=which, **{name: round(value, 3) for name, value in mean.items()}, rest=round(rest, 3))


def _parts(
    quantize: QuantizeWeights, block: Block, inputs: jax.Array, config: LlamaConfig, compiled: Mapping[str, float]
) -> None:
    """Prints the milliseconds of each part of one block; what was compiled for the run is not compiled again."""

    def watch(part: str, of: str, function: Callable[..., Any], *arguments: Any) -> Any:
        before = sum(compiled.values())
        result, seconds = _time(function, arguments)
        if sum(compiled.values()) != before:
            result, seconds = _time(function, arguments)
        show(part=part, of=of, ms=round(1e3 * seconds, 2))
        return result

    for site, names in SITES.items():
        sums = watch("forward and Hessian", site, collect, block, inputs, (site,), HESSIAN, config)[site]
        features = sums.total.shape[0]
        x = jax.random.normal(jax.random.key(2), (*inputs.shape[:2], features), inputs.dtype)
        watch("Hessian", site, _sum_moments, x)
        watch("factor", site, inverse_factor, sums.mean(), 0.01)
        rule = quantize.rule_for(f"layers.0.{names[0]}")
        assert rule is not None
        assert rule.quantizer is not None
        for part in [names] if rule.quantizer.separable else [(name,) for name in names]:
            kernels = tuple(get(block, name).kernel for name in part)
            sizes = tuple(kernel.shape[1] for kernel in kernels)
            of = f"{site} {features} x {sum(sizes)}"
            tensor, _ = watch("solve", of, solve_jointly, rule.quantizer, kernels, sums, jax.random.key(0))
            for name, own in zip(part, split_outputs(tensor, sizes), strict=True):
                block = put(block, f"{name}.kernel", own)
    dense = watch("dense weights", "block", dense_kernels, block)
    watch("advance", "block", advance, dense, inputs, config)


@jax.jit
def _sum_moments(x: jax.Array) -> Any:
    return jax.lax.scan(lambda sums, window: (HESSIAN.update(sums, window), None), HESSIAN.init(x.shape[-1]), x)[0]


def _time(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, float]:
    started = time.monotonic()
    result = jax.block_until_ready(function(*arguments))
    return result, time.monotonic() - started


def show(**figures: Any) -> None:
    """Prints a JSON line."""
    line = json.dumps(figures | {"at": round(time.monotonic() - STARTED, 1)})
    sys.stdout.write(f"{line}\n")  # one write, as compilers' threads show lines too
    sys.stdout.flush()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--recipe", default="gptq-w4g128")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--compilers", type=int, default=compilers(), help="programs compiled at once; 0 for in turn")
    parser.add_argument("--seconds", type=float, default=600.0, help="no block is begun after so many")
    parser.add_argument("--parts", action="store_true", help="time the parts of a block too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
