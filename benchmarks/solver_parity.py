r"""Whether a GPU gives what it shall: solver kernels against the scan, cuDNN's attention in calibration against XLA's.

    python benchmarks/solver_parity.py [--only solvers] [--inputs 1024] [--outputs 4096] [--seconds 90]

Prints JSON lines. All large programs are compiled first, beside each other. Kernels: how many codes of a whole solve
differ from the scan's, on a factor of correlated inputs, the loss of the kernel's solution over that of the scan's by
the undamped Hessian, outliers included, and milliseconds of both. Attention: one block of a named
shape with random bfloat16 weights, what it gives and the Hessians that it leads to: the largest differences, relative
to the root of the two diagonal entries; how many bytes of GPTQ's codes differ by it, and the loss of its codes on
XLA's Hessian over that of XLA's own codes; whether a second run has the same bits; milliseconds a window. On a CPU the
kernels are simulated: take small sizes.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from jquant.blocks.weights import OPTIONS
from jquant.calibration.ahead import MOST_COMPILERS, compile_ahead
from jquant.formats import SpqrFormat, UniformFormat, hopper_card
from jquant.models import SHAPES, Block, PromptAttention, abstract_llama, blocks, prompt_block, random_like
from jquant.quantizers import Gptq, Spqr
from jquant.quantizers.base import proxy_loss
from jquant.quantizers.ldlq import round_with_feedback
from jquant.quantizers.solver import Solver
from jquant.quantizers.statistics import HESSIAN, SecondMoment

STARTED: Final = time.monotonic()
GPTQ: Final = Gptq(UniformFormat(4, 64), order="activation")
SITES: Final = ("attention_output", "mlp_input")  # what the attention goes into


def main() -> None:
    """Prints JSON lines, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1024)
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--only", choices=("solvers", "attention"), help="leave the other out")
    parser.add_argument("--seconds", type=float, default=90.0, help="no part is begun after so many")
    arguments = parser.parse_args()
    device = jax.devices()[0].device_kind
    on_gpu = hopper_card(device) is not None
    show(device=device, jax=jax.__version__, **vars(arguments))
    parts: list[Part] = []
    if arguments.only != "attention":
        parts += _kernels(arguments.inputs, arguments.outputs, Solver.HOPPER if on_gpu else Solver.SIMULATED)
    if arguments.only != "solvers":
        parts.insert(1, _attention(arguments, "cudnn" if on_gpu else "xla"))
    show(traced=sum(len(part.programs) for part in parts))
    compile_ahead((program for part in parts for program in part.programs), MOST_COMPILERS)
    show(compiled=True)
    for part in parts:
        if time.monotonic() - STARTED > arguments.seconds:
            show(stopped=True)
            return
        part.run()


class Part(NamedTuple):
    """What is compared: the large programs of it, to be compiled beside those of other parts, and what runs them."""

    programs: tuple[jax.stages.Traced, ...]
    run: Callable[[], None]


def _kernels(inputs: int, outputs: int, kernel: Solver) -> Iterator[Part]:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2 * inputs, inputs)) @ jax.random.normal(keys[1], (inputs, inputs))
    hessian, weight = x.T @ x / x.shape[0], jax.random.normal(keys[2], (inputs, outputs))
    method, order = Spqr(SpqrFormat(bits=3, group_size=16)), jnp.argsort(-jnp.diagonal(hessian))
    problem = method.prepare(weight, hessian, order)
    limit = 0.25 * jnp.mean(jnp.var(problem.rows, axis=1) * problem.counts**2)
    target = weight + 1.5

    def spqr(solver: Solver, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        solution = method.solve(problem._replace(rows=rows, solver=solver), limit)
        return jnp.where(solution.outliers, 255, solution.codes), solution.dense

    def steps(rounding: Any, passes: int, solver: Solver, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes = round_with_feedback(
            rows, hessian, keys[0], damping=0.01, rounding=rounding, top=3, greedy_passes=passes, solver=solver
        ).codes
        return codes, codes

    in_order = hessian[order[:, None], order[None, :]]
    for name, solve, rows, moments in (
        ("SpQR, 3 bits, groups of 16", spqr, problem.rows, in_order),
        ("stochastic LDLQ, 2 bits", functools.partial(steps, "stochastic", 0), target, hessian),
        ("LDLQ, 2 bits, 2 greedy passes", functools.partial(steps, "ldlq", 2), target, hessian),
    ):
        ways = {one: compiled(functools.partial(solve, one)) for one in (kernel, Solver.SCAN)}
        lost = compiled(_loss)
        traced = *(way.trace(rows) for way in ways.values()), lost.trace(rows, rows, moments)
        yield Part(traced, functools.partial(_compare, name, ways, lost, rows, moments))


def _loss(rows: jax.Array, dense: jax.Array, hessian: jax.Array) -> jax.Array:
    off = rows - dense
    return jnp.sum(off * jnp.matmul(hessian, off, precision=jax.lax.Precision.HIGHEST))


def _compare(name: str, ways: Mapping[Solver, Any], lost: Any, rows: jax.Array, hessian: jax.Array) -> None:
    found, losses, figures = [], [], {}
    for solver, way in ways.items():
        (codes, dense), seconds = timed(way, rows)
        found.append(codes)
        losses.append(float(lost(rows, dense, hessian)))
        figures[f"{solver.value}_ms"] = round(1e3 * seconds, 2)
    differ = int(jnp.sum(found[0] != found[1]))
    show(solver=name, codes_differ=differ, of=rows.size, loss_ratio=losses[0] / losses[1], **figures)


def _attention(arguments: argparse.Namespace, kernel: PromptAttention) -> Part:
    config = SHAPES[arguments.shape]
    block = random_like(blocks(abstract_llama(config, "bfloat16"))[0], jax.random.key(0))
    shape = (arguments.windows, arguments.length, config.hidden_size)
    inputs, lengths = jax.random.normal(jax.random.key(1), shape, jnp.bfloat16), jnp.full(1, shape[1], jnp.int32)

    def run(own: PromptAttention | None, block: Block, inputs: jax.Array) -> tuple[jax.Array, dict[str, SecondMoment]]:
        attending = dataclasses.replace(config, prompt_attention=own)

        def window(sums: dict[str, SecondMoment], x: jax.Array) -> tuple[dict[str, SecondMoment], jax.Array]:
            out, _, taps = prompt_block(block, x[None], lengths, x.shape[0], attending)
            return {site: HESSIAN.update(sums[site], getattr(taps, site)[0]) for site in SITES}, out[0]

        sums, outputs = jax.lax.scan(window, {site: HESSIAN.init(config.hidden_size) for site in SITES}, inputs)
        return outputs, sums

    weight = block.self_attn.o_proj.kernel
    taken, usual = (jax.jit(functools.partial(run, own)) for own in (kernel, None))
    solve = compiled(lambda moment: GPTQ(weight, moment, jax.random.key(0))[0])
    sums = jax.eval_shape(lambda: HESSIAN.init(config.hidden_size))
    traced = taken.trace(block, inputs), usual.trace(block, inputs), solve.trace(sums)
    return Part(traced, functools.partial(_compare_attention, kernel, taken, usual, solve, block, inputs))


def _compare_attention(name: str, taken: Any, usual: Any, solve: Any, block: Block, inputs: jax.Array) -> None:
    figures = {}
    mine, seconds = timed(taken, block, inputs)
    figures["ms_a_window"] = round(1e3 * seconds / inputs.shape[0], 2)
    again = taken(block, inputs)
    theirs, seconds = timed(usual, block, inputs)
    figures["xla_ms_a_window"] = round(1e3 * seconds / inputs.shape[0], 2)
    same = all(bool(jnp.array_equal(a, b)) for a, b in zip(*map(jax.tree.leaves, (mine, again)), strict=True))
    outputs = [each[0].astype(jnp.float32) for each in (mine, theirs)]
    off = float(jnp.max(jnp.abs(outputs[0] - outputs[1])) / jnp.max(jnp.abs(outputs[1])))
    show(attention=name, same_bits_again=same, outputs_off=off, **figures)
    kernel = block.self_attn.o_proj.kernel.astype(jnp.float32)
    for site in SITES:
        one, other = (each[1][site].mean() for each in (mine, theirs))
        size = jnp.sqrt(jnp.diagonal(other))
        error = float(jnp.max(jnp.abs(one - other) / (size[:, None] * size[None, :])))
        tensors = [solve(each[1][site]) for each in (mine, theirs)]
        losses = [jnp.sum(proxy_loss(kernel, tensor, other)) for tensor in tensors]
        differ = float(jnp.mean(tensors[0].codes != tensors[1].codes))
        show(site=site, hessian_off=error, bytes_of_codes_differ=differ, loss_ratio=float(losses[0] / losses[1]))


def compiled(function: Callable[..., Any]) -> Any:
    """Returns a function compiled as solves are."""
    return jax.jit(function, compiler_options=OPTIONS)


def timed(function: Callable[..., Any], *given: Any) -> tuple[Any, float]:
    """Returns a result, and the seconds of a second call."""
    jax.block_until_ready(function(*given))
    started = time.monotonic()
    result = jax.block_until_ready(function(*given))
    return result, time.monotonic() - started


def show(**figures: Any) -> None:
    """Prints a JSON line."""
    print(json.dumps(figures | {"at": round(time.monotonic() - STARTED, 1)}), flush=True)


if __name__ == "__main__":
    main()
