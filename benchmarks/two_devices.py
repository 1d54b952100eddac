r"""Two GPUs against one: logits and speed of a model spread over them, calibration spread over them, bits of its sums.

Generation: random codes in a model of Llama-3.1-8B's shape by W4A16 (rtn-w4g128) and W4A4 (quarot-w4a4), on one device
and over tensor=2: how far the logits after a prompt are apart, how many greedy tokens agree, tokens a second.
Calibration: GPTQ's Hessians and the inputs of the next block, 2048 tokens a window, on one device and over data=2: the
seconds, and whether every bit of every sum is the same.

    python benchmarks/two_devices.py [--seconds 280] [--parts calibration W4A16 W4A4] [--layers 32] [--tiny]

JSON lines as figures come. Parts are made and compiled at the same time and measured in turn; what is not done after
--seconds is stopped. Without autotuning (XLA_FLAGS=--xla_gpu_autotune_level=0) it compiles in half the time.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from jquant.blocks import SITES, Lanes, collect_all
from jquant.calibration import advance_all
from jquant.folders import make_ready
from jquant.models import (
    SHAPES,
    Llama,
    abstract_llama,
    empty_cache,
    place_cache,
    random_like,
    tiny_config,
)
from jquant.plan import outline
from jquant.quantizers import HESSIAN
from jquant.recipe import load_recipe
from jquant.runtime import Writing, advance, prefill, token_stride
from jquant.sharding import describe_mesh, make_mesh
from jquant.targets import describe_products

RECIPES: Final[Mapping[str, str]] = {"W4A16": "rtn-w4g128", "W4A4": "quarot-w4a4"}
PARTS: Final = ("calibration", *RECIPES)
PROMPT: Final = 512
TOKENS: Final = 64  # that a run of decode writes for each row
REPEATS: Final = 3
BATCH: Final = 16
WINDOWS: Final = 64
SHOWN: Final = 800  # last characters of an error


def main() -> None:
    """Starts a process for each part, so that programs are traced and compiled at once; they measure one by one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=280.0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="a tiny model in place of Llama-3.1-8B's shape")
    parser.add_argument("--turns", type=Path, help="of a child: the file that is locked while it measures")
    arguments = parser.parse_args()
    if arguments.turns is not None:
        _measure(arguments)
        return
    end = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as folder:
        options = [f"--turns={folder}/turns", f"--layers={arguments.layers}", *["--tiny"] * arguments.tiny]
        command = [sys.executable, __file__, *options, "--parts"]
        share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / len(arguments.parts):.2f}"}
        children = [subprocess.Popen([*command, part], env=os.environ | share) for part in arguments.parts]
        for part, child in zip(arguments.parts, children, strict=True):
            try:
                child.wait(max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                child.kill()
                _say(of=part, stopped="no time left")


def _measure(arguments: argparse.Namespace) -> None:
    (part,) = arguments.parts
    started = time.monotonic()
    mesh = describe_mesh(make_mesh(1, 2))
    _say(of=part, mesh=mesh, jax=jax.__version__, date=time.strftime("%Y-%m-%d"), flags=os.environ.get("XLA_FLAGS"))
    turn = _Turn(arguments.turns)
    try:
        if part == "calibration":
            measure_calibration(turn, tiny=arguments.tiny)
        else:
            measure_generation(part, arguments.layers, turn, tiny=arguments.tiny)
    except (RuntimeError, ValueError, TypeError, AssertionError):
        _say(of=part, error=traceback.format_exc()[-SHOWN:])
    _say(of=part, seconds=time.monotonic() - started)


class _Turn:
    """Lets one process at a time measure."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        with self.path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def measure_calibration(turn: _Turn, *, tiny: bool) -> None:
    """Sums Hessians of all sites of one block, and runs it, over windows on one device and on two."""
    config = tiny_config() if tiny else dataclasses.replace(SHAPES["llama-3.1-8b"], num_hidden_layers=1)
    dtype, length = ("float32", 64) if tiny else ("bfloat16", 2048)
    model: Any = random_like(abstract_llama(config, dtype), jax.random.key(0))
    block = model.layers[0]
    states = jax.random.normal(jax.random.key(1), (WINDOWS, length, config.hidden_size), dtype)
    lanes = {count: Lanes.make(WINDOWS, tuple(jax.devices()[:count]), lambda run: states[run]) for count in (2, 1)}

    def run(count: int) -> tuple[float, float, Any, Any]:
        begun = time.monotonic()
        sums = jax.block_until_ready(collect_all(block, lanes[count], tuple(SITES), HESSIAN, config))
        summed = time.monotonic()
        after = advance_all(block, lanes[count], config)
        jax.block_until_ready(after.parts)
        return summed - begun, time.monotonic() - summed, sums, after.parts

    digests, seconds = {}, {}
    for count in (2, 1):
        first = run(count)  # both devices' programs are compiled at once, in threads
        with turn.taken():
            times = [run(count)[:2] for _ in range(2)]
        digests[count] = {"sums": _sha256(first[2]), "outputs": _sha256(first[3])}
        seconds[count] = min(sum(pair) for pair in times)
        _say(
            of="calibration",
            devices=count,
            windows=WINDOWS,
            tokens=length,
            dtype=dtype,
            first_seconds=first[0] + first[1],
            hessian_seconds=[pair[0] for pair in times],
            forward_seconds=[pair[1] for pair in times],
            **digests[count],
        )
    _say(of="calibration", speedup=seconds[1] / seconds[2], same_bits=digests[1] == digests[2])


def measure_generation(part: str, layers: int, turn: _Turn, *, tiny: bool) -> None:
    """Reads a prompt and writes tokens on one device and on two."""
    config = tiny_config("llama2") if tiny else dataclasses.replace(SHAPES["llama-3.1-8b"], num_hidden_layers=layers)
    recipe = load_recipe(RECIPES[part], ["*.group_size=16"] if tiny and part == "W4A16" else [])
    tree = outline(abstract_llama(config, "float32" if tiny else "bfloat16"), recipe)
    begun = time.monotonic()
    whole = random_like(tree, jax.random.key(0))
    models = {1: make_ready(whole, "auto"), 2: make_ready(whole, "auto", make_mesh(1, 2))}
    jax.block_until_ready(models)
    del whole
    products = {count: describe_products(model) for count, model in models.items()}
    _say(of=part, layers=config.num_hidden_layers, products=products, making_seconds=time.monotonic() - begun)
    prompt, length = (32, 16) if tiny else (PROMPT, TOKENS)
    with ThreadPoolExecutor(8) as pool:
        prompts = {count: pool.submit(_compile_prompt, model, prompt) for count, model in models.items()}
        decodes = {
            (count, rows): pool.submit(_compile_decode, model, rows, prompt, length)
            for rows in (1, BATCH)
            for count, model in models.items()
        }
        found = {}
        for rows in (1, BATCH):
            for count in models:
                run = decodes[count, rows].result()
                with turn.taken():
                    found[count, rows] = _time_decode(part, count, rows, run)
            _say(of=part, rows=rows, speedup=found[1, rows][0] / found[2, rows][0])
            if rows == 1:
                _compare_prompts(part, {count: run.result() for count, run in prompts.items()}, turn)
    same = int(np.sum(found[1, 1][1] == found[2, 1][1]))
    _say(of=part, greedy_tokens_alike=same, of_tokens=found[1, 1][1].size)


def _compile_prompt(model: Llama, length: int) -> Callable[[], np.ndarray]:
    """Returns what reads a prompt and gives the logits after it."""
    tokens = jax.random.randint(jax.random.key(2), (1, length), 0, model.config.vocab_size, jnp.int32)
    lengths, capacity = jnp.full(1, length, jnp.int32), length + 128
    program = prefill.lower(model, tokens, lengths, capacity=capacity).compile()
    return lambda: np.asarray(program(model, tokens, lengths)[0], np.float64)[0]


def _compare_prompts(part: str, runs: dict[int, Callable[[], np.ndarray]], turn: _Turn) -> None:
    logits, seconds = {}, {}
    for count, run in runs.items():
        logits[count] = run()
        times = []
        with turn.taken():
            for _ in range(REPEATS):
                begun = time.monotonic()
                run()
                times.append(time.monotonic() - begun)
        seconds[count] = sorted(times)[REPEATS // 2]
    one, two = logits[1], logits[2]
    log_one, log_two = (each - np.logaddexp.reduce(each) for each in (one, two))
    _say(
        of=part,
        prompt_seconds=seconds,
        logits_std=float(one.std()),
        logits_apart=float(np.abs(one - two).max()),
        relative=float(np.linalg.norm(one - two) / np.linalg.norm(one)),
        kl=float(np.sum(np.exp(log_one) * (log_one - log_two))),
        argmax_alike=bool(one.argmax() == two.argmax()),
    )


@dataclasses.dataclass
class _Decode:
    """Writes `room` tokens more at each call."""

    program: Any
    model: Llama
    writing: Any
    room: int
    compile_seconds: float
    until: int = 0

    def __call__(self) -> tuple[np.ndarray, float]:
        self.until += self.room
        begun = time.monotonic()
        written, _, self.writing = self.program(self.model, self.writing, jnp.int32(self.until), *_constants())
        tokens = np.asarray(written)[:, : self.room]
        return tokens, time.monotonic() - begun


def _constants() -> tuple[Any, Any]:
    return jnp.zeros(0, jnp.int32), jax.random.key(4)


def _compile_decode(model: Llama, rows: int, context: int, length: int) -> _Decode:
    """Returns what writes tokens behind a context of zeros, so that it is the same on one device and two."""
    begun, stride = time.monotonic(), token_stride()
    room = -(-length // stride) * stride
    capacity = -(-(context + room * (REPEATS + 1)) // 128) * 128
    cache = jax.jit(lambda: empty_cache(model, rows, capacity))()
    cache = cache.replace(layers=place_cache(model, cache.layers), positions=jnp.full(rows, context, jnp.int32))
    writing = Writing(jnp.arange(rows, dtype=jnp.int32) + 7, jnp.zeros(rows, jnp.bool_), jnp.int32(0), cache)
    program = advance.lower(model, writing, jnp.int32(0), *_constants(), room=room, stride=stride).compile()
    return _Decode(program, model, writing, room, time.monotonic() - begun)


def _time_decode(part: str, count: int, rows: int, run: _Decode) -> tuple[float, np.ndarray]:
    tokens, _ = run()
    times = [run()[1] for _ in range(REPEATS)]
    median = sorted(times)[REPEATS // 2]
    rate = rows * tokens.shape[1] / median
    _say(of=part, devices=count, rows=rows, tokens_per_second=rate, seconds=times, compile_seconds=run.compile_seconds)
    return median, tokens[0]


def _sha256(tree: Any) -> str:
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        total.update(np.ascontiguousarray(np.asarray(leaf)).view(np.uint8).tobytes())
    return total.hexdigest()[:16]


def _say(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
