r"""Models on a target's kernels beside XLA: SmolLM2-135M's logits and generation, the time of Llama-3.1-8B's blocks.

A case of the model quantizes SmolLM2-135M-Instruct by rounding to nearest and prints, for XLA in bfloat16 and for the
kernels, how far the logits are from those of the same weights in float32 arithmetic, the perplexity, how many of some
greedy tokens agree, and tokens a second. A case of blocks has random weights and prints the time of one token and of a
prompt through some layers: all GPU kernels together (CUPTI), and by the clock.

    python benchmarks/runtime_kernels.py [--cases W4A16 "block W4A16" ...] [--model FILE.gguf] [--windows FILE.npy]

JSON lines: figures "of" a case as they come, then the "case" with its seconds. A case that fails is a line too, and the
rest goes on in a new process, as a GPU's context does not survive a bad access; so is one that is left out for want of
time (--seconds). The exit code is 1 then.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
import numpy as np

from convert import default_cache, demo_model, load_model, load_tokenizer
from jquant import models
from jquant.activations import ActivationMethod, PerToken
from jquant.data import PYTHON_DOCS, load_text, token_windows
from jquant.formats import UniformFormat, UniformTensor
from jquant.machines import Target
from jquant.models import Linear, Llama, LlamaConfig, blocks, build, map_linears, stack_layers
from jquant.numerics import packed_length
from jquant.quantizers import Rtn
from jquant.runtime import generate
from jquant.targets import describe_products, prepare
from pallas_kernels.compat import kernel_times

type Way = Literal["XLA", "kernels", "kernels, stacked"]

INT4: Final = UniformFormat(4, None, "symmetric")
INT8: Final = UniformFormat(8, None, "symmetric")
MODELS: Final[Mapping[str, tuple[UniformFormat, ActivationMethod | None]]] = {
    "W4A16": (UniformFormat(4, 64), None),
    "W8A8": (UniformFormat(8, None), PerToken(8, "asymmetric")),  # as the preset rtn-w8a8
    "W4A8": (INT4, PerToken(8)),
    "W4A4": (INT4, PerToken(4, clip_ratio=0.9)),
    "W4A16 per channel": (INT4, None),
}
BLOCKS: Final[Mapping[str, tuple[UniformFormat | None, ActivationMethod | None, Way]]] = {
    "block bfloat16": (None, None, "XLA"),
    "block W4A16": (UniformFormat(4, 128), None, "kernels"),
    "block W4A16 stacked": (UniformFormat(4, 128), None, "kernels, stacked"),
    "block W8A8": (INT8, PerToken(8), "kernels"),
    "block W4A8": (INT4, PerToken(8), "kernels"),
    "block W8A8 by XLA": (INT8, PerToken(8), "XLA"),
    "block W4A16 by XLA": (UniformFormat(4, 128), None, "XLA"),
}
CASES: Final = (*MODELS, *BLOCKS)
WAYS: Final[tuple[Way, ...]] = ("XLA", "kernels", "kernels, stacked")
# Sizes of Llama-3.1-8B from its published config.json, but for 4 layers and a vocabulary that takes no time.
LLAMA_8B: Final = LlamaConfig(128, 4096, 14336, 4, 32, 8, 128, max_position_embeddings=8192)
SHOWN: Final = 600  # last characters of an error
GRACE: Final = 60.0  # seconds beyond --seconds after which a case that hangs is killed


def main() -> None:
    """Runs the cases in processes that each last until one fails."""
    arguments = _arguments()
    end, left, failed = time.monotonic() + arguments.seconds, list(arguments.cases), False
    if arguments.child:
        _run_cases(left, end, arguments)
        return
    while left:
        options = ["--child", "--seconds", str(end - time.monotonic()), "--cases", *left]
        command = [sys.executable, *sys.argv, *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            killer = threading.Timer(max(1.0, end + GRACE - time.monotonic()), child.kill)
            killer.start()
            told = 0
            for line in child.stdout or ():
                print(line, end="", flush=True)
                found = json.loads(line) if line.startswith("{") else {}
                if found.get("case") in left:
                    left.remove(found["case"])
                    told += 1
                failed = failed or bool({"error", "skipped"} & found.keys())
            killer.cancel()
        if left and (child.returncode != 1 or not told):  # it did not end by its own word
            print(json.dumps({"case": left.pop(0), "error": f"the process ended with {child.returncode}"}), flush=True)
            failed = True
    sys.exit(int(failed))


def _run_cases(cases: list[str], end: float, arguments: argparse.Namespace) -> None:
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "command": sys.argv}), flush=True)
    for name in cases:
        started = time.monotonic()
        if started > end:
            print(json.dumps({"case": name, "skipped": "no time is left; see --seconds"}), flush=True)
            continue
        try:
            for figures in _model_case(name, arguments) if name in MODELS else _block_case(name, arguments):
                print(json.dumps({"of": name, **figures}), flush=True)
        except Exception as error:  # noqa: BLE001  whatever it is, it is this case's result
            print(json.dumps({"case": name, "error": f"{type(error).__name__}: {error}"[-SHOWN:]}), flush=True)
            sys.exit(1)
        print(json.dumps({"case": name, "seconds": round(time.monotonic() - started, 1)}), flush=True)


def _model_case(name: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the figures of the weights in float32 arithmetic, then those of each way."""
    format, method = MODELS[name]
    portable = _quantized(_model(arguments.model, arguments.layers), format, method)
    stacked, windows = stack_layers(portable), jnp.asarray(_windows(arguments))
    forward = jax.jit(models.forward)
    with jax.default_matmul_precision("highest"):
        truth = forward(_float32(stacked), windows)
    yield {"way": "float32", "perplexity": _perplexity(truth, windows)}
    prompt = np.asarray(windows)[0, : arguments.prompt].tolist()
    expected: tuple[int, ...] = ()
    for way in arguments.ways:
        model = (
            stacked if way == "XLA" else prepare(portable if way == "kernels" else stacked, Target(arguments.target))
        )
        logits = forward(model, windows)
        figures: dict[str, Any] = {
            "way": way,
            "products": describe_products(model),
            "error of logits": float(jnp.linalg.norm(logits - truth) / jnp.linalg.norm(truth)),
            "same first choice": float(jnp.mean(logits.argmax(-1) == truth.argmax(-1))),
            "perplexity": _perplexity(logits, windows),
        }
        if arguments.tokens:
            for _ in range(2):  # the first one compiles
                started = time.monotonic()
                tokens = generate(model, [prompt], max_tokens=arguments.tokens).tokens[0]
                seconds = time.monotonic() - started
            expected = expected or tokens
            same = [a == b for a, b in zip(tokens, expected)]
            figures |= {
                "tokens a second": round(len(tokens) / seconds, 1),
                f"tokens as by {arguments.ways[0]} until one differs": (*same, False).index(False),
            }
        yield figures


def _block_case(name: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the time of one token, then that of many."""
    format, method, way = BLOCKS[name]
    config = dataclasses.replace(LLAMA_8B, num_hidden_layers=arguments.depth)
    model = _random_blocks(config, format, method)
    if way != "kernels":
        model = stack_layers(model)
    if way != "XLA":
        model = prepare(model, Target(arguments.target))
    tokens, capacity = jnp.ones((1, arguments.long), jnp.int32), 128
    shapes = jax.eval_shape(lambda: models.prefill(model, tokens[:, :8], jnp.array([8]), capacity))[1]
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    decode, forward = jax.jit(models.decode), jax.jit(models.forward)
    about = {"products": describe_products(model), "layers": config.num_hidden_layers}
    yield {"tokens": 1, **about, **_times(lambda: decode(model, tokens[:, 0], cache), arguments.repeats)}
    yield {"tokens": arguments.long, **about, **_times(lambda: forward(model, tokens), arguments.repeats)}


def _times(function: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Returns microseconds of one call: by the clock of calls in a row, and the median of its GPU kernels' sum."""
    jax.block_until_ready(function())
    started = time.monotonic()
    jax.block_until_ready([function() for _ in range(repeats)])
    found = {"us by the clock": 1e6 * (time.monotonic() - started) / repeats}
    if jax.default_backend() == "gpu":
        sums = []
        for _ in range(3):
            with kernel_times() as times:
                jax.block_until_ready(function())
            sums.append(sum(microseconds for _, microseconds in times))
        found |= {"us of kernels": statistics.median(sums), "kernels": len(times)}
    return {key: round(value, 1) for key, value in found.items()}


@functools.cache
def _model(path: Path | None, layers: int | None) -> Llama:
    model = load_model(path or demo_model(default_cache()), dtype="bfloat16")
    kept = blocks(model)[:layers]
    config = dataclasses.replace(model.config, num_hidden_layers=len(kept))
    return dataclasses.replace(model, layers=kept, config=config)


def _windows(arguments: argparse.Namespace) -> np.ndarray:
    if arguments.windows is None:
        source = arguments.model or demo_model(default_cache())
        text = load_text(PYTHON_DOCS, "evaluation")
        return token_windows(text, load_tokenizer(source), length=arguments.length, count=arguments.count)
    return np.load(arguments.windows)[: arguments.count, : arguments.length].astype(np.int32)


def _quantized(model: Llama, format: UniformFormat, method: ActivationMethod | None) -> Llama:
    quantizer, round_ = None if method is None else method.fit(None), jax.jit(Rtn(format))

    def change(path: str, layer: Linear) -> Linear:
        del path
        return dataclasses.replace(
            layer, kernel=round_(layer.kernel, None, jax.random.key(0))[0], input_quantizer=quantizer
        )

    return map_linears(model, change)


def _float32(model: Llama) -> Llama:
    """Returns the model with activations in float32; scales stay as they are stored."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, model)


def _random_blocks(config: LlamaConfig, format: UniformFormat | None, method: ActivationMethod | None) -> Llama:
    """Returns a model of random codes, or of bfloat16; only its shapes matter, but values stay finite."""
    key = jax.random.key(0)
    filled = jax.jit(lambda shape: jax.random.normal(key, shape, jnp.bfloat16) / 64, static_argnums=0)
    dense = build(config, lambda path, shape: filled(shape))
    if format is None:
        return dense

    @functools.cache
    def tensor(shape: tuple[int, int]) -> UniformTensor:
        inputs, outputs = shape
        groups = format.groups(inputs)
        codes = jax.random.bits(key, (packed_length(inputs, format.bits), outputs), jnp.uint8)
        zeros = jnp.full((packed_length(groups, format.bits), outputs), 0x88, jnp.uint8)  # 8 for each group
        scales = jnp.full((groups, outputs), 1 / 1024, format.scale_dtype)
        return UniformTensor(codes, scales, zeros if format.symmetry == "asymmetric" else None, format, shape)

    quantizer = None if method is None else method.fit(None)
    return map_linears(
        dense,
        lambda path, layer: Linear(
            jax.tree.map(jnp.copy, tensor(layer.kernel.shape)), layer.bias, input_quantizer=quantizer
        ),
    )


def _perplexity(logits: jax.Array, windows: jax.Array) -> float:
    likely = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), windows[:, 1:, None], axis=-1)
    return float(jnp.exp(-jnp.mean(likely)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=CASES)
    parser.add_argument("--model", type=Path, help="the GGUF file; the demo's if left out")
    parser.add_argument("--windows", type=Path, help="a .npy file of token ids; Python's own documentation if left out")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS[:2], help="of the model's cases")
    parser.add_argument("--count", type=int, default=2, help="windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt, the first window's first")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate; 0 for none")
    parser.add_argument("--layers", type=int, help="of the model; all if left out")
    parser.add_argument("--depth", type=int, default=LLAMA_8B.num_hidden_layers, help="blocks of a case of blocks")
    parser.add_argument("--long", type=int, default=2048, help="tokens of the prompt that goes through the blocks")
    parser.add_argument("--repeats", type=int, default=20, help="calls in a row that the clock measures")
    parser.add_argument("--target", choices=[target.value for target in Target], default=Target.H100.value)
    parser.add_argument("--seconds", type=float, default=85.0, help="after which no case is begun")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
