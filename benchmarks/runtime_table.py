r"""The table of docs/runtime.md in one run: bfloat16 and recipes of Llama-3.1-8B, random codes, on one GPU.

Every row is timed by `eval.measure_latency`, tokens or prompts, with its memory; then the GPU's kernels of one run are
summed by kind (CUPTI). Programs are compiled first, in threads side by side, from shapes alone; what is not compiled or
timed when the time is over is said to be left out.

    python benchmarks/runtime_table.py --seconds 240 [--rows "w4 1" "bf16 1"]

Prints JSON lines, the most important rows first.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from eval import Latency, Lowered, Phase, Programs, Workload, lower_latency, measure_latency, start_decode
from jquant.folders import round_scales
from jquant.machines import Target
from jquant.models import SHAPES, Llama, abstract_llama, random_like
from jquant.plan import outline
from jquant.recipe import load_recipe
from jquant.runtime import GRAPHS
from jquant.targets import describe_products, prepare
from pallas_kernels import norm, reference, wide

STRIDE: Final = 8  # steps of one run of `advance`: the fewest that its loop takes on a GPU
THREADS: Final = 12  # programs that XLA compiles at once
SHARE_TO_COMPILE: Final = 0.5  # of the seconds; rows that are not compiled then are left out
ONE: Final = Workload(1, prompt=0, context=2048, tokens=64, repeats=5)
MANY: Final = Workload(16, prompt=0, context=8000, tokens=32, repeats=3)
PROMPTS: Final = Workload(4, prompt=2048, tokens=0, repeats=5)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      name: of the line.
      recipes: presets joined by "+", each with ":" and a change where it has one; empty for bfloat16.
      workload: what is timed.
    """

    name: str
    recipes: str
    workload: Workload


ROWS: Final = (
    Row("w4 1", "rtn-w4g128+head8", ONE),
    Row("bf16 1", "", ONE),
    Row("w4kv4 16", "rtn-w4g128+head8+kv4", MANY),
    Row("bf16 16", "", MANY),
    Row("quarot prompts", "quarot-w4a4-rtn", PROMPTS),
    Row("bf16 prompts", "", PROMPTS),
    Row("w4a16 prompts", "rtn-w4g128", PROMPTS),
    Row("w4kivi2 16", "rtn-w4g128+head8+kivi-2", MANY),
    Row("quarot kv4 16", "quarot-w4a4-rtn+head8+kv4", MANY),
)


def main() -> None:
    """Compiles all rows, then times and profiles one after another."""
    arguments = _arguments()
    began = time.monotonic()
    device = jax.devices()[0].device_kind
    _print(device=device, jax=jax.__version__, layers=arguments.layers, target=arguments.target)
    rows = [row for row in ROWS if row.name in arguments.rows]
    trees = {row.name: _outline(row, arguments) for row in rows}
    pool = concurrent.futures.ThreadPoolExecutor(THREADS)
    lowered = {row.name: _lower(row, trees[row.name], arguments.target) for row in rows}
    jobs = {name: pool.submit(each.compile) for name, each in lowered.items()}
    profiled = {name: pool.submit(_compile_to_profile, each) for name, each in lowered.items()}
    _print(lowered=True, seconds=round(time.monotonic() - began, 1))
    concurrent.futures.wait(jobs.values(), timeout=SHARE_TO_COMPILE * arguments.seconds - (time.monotonic() - began))
    _print(compiled=[name for name, job in jobs.items() if job.done()], seconds=round(time.monotonic() - began, 1))
    if jax.default_backend() == "gpu":
        _check()
    for row in sorted(rows, key=lambda row: not jobs[row.name].done()):
        left = arguments.seconds - (time.monotonic() - began)
        if left < 0:
            _print(row=row.name, skipped="no time")
            continue
        try:
            _measure(row, trees[row.name], jobs[row.name].result(timeout=left), profiled[row.name], arguments)
        except Exception as error:  # noqa: BLE001  whatever it is, it is this row's result
            _print(row=row.name, error=f"{type(error).__name__}: {error}"[:900])
        _print(row=row.name, done=round(time.monotonic() - began, 1))
    pool.shutdown(wait=False, cancel_futures=True)


def _compile_to_profile(lowered: Lowered) -> Any:
    """Compiles steps whose loop is not recorded into a CUDA graph: of such a loop CUPTI sees the first step alone."""
    if lowered.decode is None:
        return None
    return lowered.decode[0].compile(compiler_options={"xla_gpu_enable_command_buffer": GRAPHS})


def _measure(
    row: Row,
    tree: Llama,
    programs: Programs,
    profiled: concurrent.futures.Future[Any],
    arguments: argparse.Namespace,
) -> None:
    key, started = jax.random.key(0), time.monotonic()
    model = jax.block_until_ready(_ready(random_like(tree, key), arguments.target))
    about = {"row": row.name, "recipe": row.recipes or "bfloat16"}
    _print(**about, products=describe_products(model), making_s=round(time.monotonic() - started, 1))
    found = measure_latency(model, row.workload, programs=programs, key=key)
    _print(**about, workload=row.workload.describe(), **_figures(found))
    if jax.default_backend() == "gpu":
        run = profiled.result() if programs.prefill is None else programs.prefill.run
        _print(**about, **_profile(model, row.workload, run))


def _check() -> None:
    """Prints how far the head's kernel and the norm's are from their meaning on this GPU."""
    keys = jax.random.split(jax.random.key(0), 5)
    codes = jax.random.bits(keys[0], (4096, 4096), jnp.uint8).astype(jnp.int8)
    scales = jax.random.uniform(keys[1], (4096,), jnp.float32, 0.5, 1.5)
    weight = jax.jit(wide.prepare_w8a16)(codes, scales)
    for rows in (1, 16):
        x, update = (jax.random.normal(key, (rows, 4096), jnp.bfloat16) for key in keys[2:4])
        expected = np.asarray(x, np.float32) @ np.asarray(codes, np.float32).T * np.asarray(scales)
        error = np.asarray(jax.jit(wide.w8a16_decode)(x, weight), np.float32) - expected
        given = x.astype(jnp.float32), update, scales.astype(jnp.bfloat16)
        sums, normed = jax.jit(lambda x, u, s: norm.add_norm(x, u, s, eps=1e-5))(*given)
        sum_, normal = reference.add_norm(*given, 1e-5)
        _print(
            rows=rows,
            head=float(np.linalg.norm(error) / np.linalg.norm(expected)),
            sums=bool(jnp.all(sums == sum_)),
            norms=float(jnp.max(jnp.abs(normed.astype(jnp.float32) - normal.astype(jnp.float32)))),
        )


def _figures(found: Latency) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "weights_gb": found.weights_nbytes / 1e9,
        "cache_gb": found.cache_nbytes / 1e9,
        "peak_gb": found.peak_nbytes() / 1e9,
        "live_gb": found.live_nbytes / 1e9,
    }
    for name, phase in (("prefill", found.prefill), ("decode", found.decode)):
        if phase is not None:
            figures[name] = _phase(phase)
    return figures


def _phase(phase: Phase) -> dict[str, Any]:
    return {
        "ms": [round(1e3 * one, 3) for one in phase.seconds],
        "tok_s": round(phase.tokens_per_second(), 1),
        "compile_s": round(phase.compile_seconds, 1),
    }


def _profile(model: Llama, workload: Workload, run: Any) -> dict[str, Any]:
    """Returns microseconds and counts of the kernels of one step, or of all prompts, by kind in a layer's order."""
    key, stops = jax.random.key(1), jnp.zeros(0, jnp.int32)
    if workload.tokens:
        writing = start_decode(model, workload, key=key)
        *_, writing = run(model, writing, jnp.int32(STRIDE), stops, key)
        jax.block_until_ready(writing)
        with _kernels() as found:
            jax.block_until_ready(run(model, writing, jnp.int32(2 * STRIDE), stops, key))
        steps = STRIDE
    else:
        tokens = jnp.ones((workload.batch, workload.prompt), jnp.int32)
        lengths = jnp.full(workload.batch, workload.prompt, jnp.int32)
        with _kernels() as found:
            jax.block_until_ready(run(model, tokens, lengths, stops, key))
        steps = 1
    sums: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for name, microseconds in _placed(found, steps, model.config.num_hidden_layers):
        sums[name][0] += 1 / steps
        sums[name][1] += microseconds / steps
    ranked = sorted(sums.items(), key=lambda item: -item[1][1])
    kinds = {name: [round(count, 2), round(us, 1)] for name, (count, us) in ranked}
    return {"kernels": len(found) / steps, "kernels_us": round(sum(us for _, us in sums.values()), 1), "kinds": kinds}


def _placed(found: list[tuple[str, float]], steps: int, layers: int) -> Iterator[tuple[str, float]]:
    """Yields each kernel's kind: XLA's without their numbers, our own with their place in the layer."""
    own = re.compile(r"_?mosaic_gpu_kernel.*")
    counts: collections.Counter[str] = collections.Counter(name for name, _ in found)
    seen: collections.Counter[str] = collections.Counter()
    for name, microseconds in found:
        kind = re.sub(r"(_\d+)+$", "", name)
        if own.search(name):
            each, place = counts[name] // steps, seen[name] % max(1, counts[name] // steps)
            inside = each // layers * layers
            kind = own.sub("", name)
            kind += f" {place % (each // layers)}" if place < inside else " after the layers"
            seen[name] += 1
        yield kind, microseconds


@contextlib.contextmanager
def _kernels() -> Iterator[list[tuple[str, float]]]:
    """Yields a list that holds, after the block, names and microseconds of the GPU kernels that ran in it, in order."""
    from jax._src.lib import mosaic_gpu

    library: Any = vars(mosaic_gpu)["_mosaic_gpu_ext"]
    found: list[tuple[str, float]] = []
    library._cupti_init()
    try:
        yield found
    finally:
        found += [(name, 1e3 * milliseconds) for name, milliseconds in library._cupti_get_timings(True)]


def _outline(row: Row, arguments: argparse.Namespace) -> Llama:
    config = dataclasses.replace(SHAPES[arguments.shape], num_hidden_layers=arguments.layers)
    model = abstract_llama(config, "bfloat16")
    for name in filter(None, row.recipes.split("+")):
        preset, *changes = name.split(":")
        model = outline(model, load_recipe(preset, changes))
    return model


def _ready(model: Llama, target: str) -> Llama:
    return prepare(round_scales(model, Target(target)), Target(target))


def _lower(row: Row, tree: Llama, target: str) -> Lowered:
    return lower_latency(jax.eval_shape(lambda model: _ready(model, target), tree), row.workload)


def _print(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [row.name for row in ROWS]
    parser.add_argument("--rows", nargs="*", choices=names, default=names)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=240.0, help="after which no row is begun")
    parser.add_argument("--target", default="h100", choices=["reference", "h100", "h200"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
