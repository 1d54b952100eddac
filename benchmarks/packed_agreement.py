r"""A packed model on a GPU's kernels beside the same weights in float32 arithmetic: logits, perplexity, greedy tokens.

SmolLM2-135M-Instruct is quantized by recipes that need no calibration. The reference is the portable tree with float32
activations through XLA at full precision, on the same GPU: the first line says how far it is from the same on the CPU.
Figures of a recipe:

1. "logits", all windows, their queries seeing what the recipe shows a prompt: the difference's norm over that of the
   reference's logits, the largest difference over the largest logit, perplexities; beside it, of a few windows, what
   XLA makes of the portable tree in bfloat16. Codes of caches and of activations in few bits fall elsewhere wherever
   bfloat16 rounds across a boundary, by whatever kernel;
2. "steps": tokens one by one behind each prompt, greedily by the packed model, and for each the reference's logits over
   *the same packed bytes*: what the kernels themselves are off by;
3. "greedy": `generate` by both. Where tokens part, the line says how far apart the two tokens' logits are in the
   reference, in steps of bfloat16 (below one or two it is a tie in bfloat16). Of steps, too.

Layers are stacked, which compiles in a fraction of the time; with --apart they lie as `jquant generate` has them.

    JAX_PLATFORMS=cuda,cpu python benchmarks/packed_agreement.py --model FILE.gguf --windows FILE.npy [--recipes ...]

Prompts are the first tokens of windows. JSON lines, one as each figure comes.
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, final

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from convert import default_cache, demo_model, load_model
from jquant import models
from jquant.folders import stack_if_alike
from jquant.formats import Layout
from jquant.kv import KvCodec, attention_kernel
from jquant.models import Block, Llama, Stacked, blocks
from jquant.passes import Context, run_passes
from jquant.recipe import load_recipe
from jquant.runtime import generate
from jquant.targets import Target, describe_products, prepare

RECIPES: Final = ("rtn-w4g64", "rtn-w4g64+kv4", "rtn-w4g64+kivi-2", "quarot-w4a4-rtn+kv4")
FIGURES: Final = ("logits", "steps", "greedy")
BFLOAT16_STEP: Final = 2.0**-7  # between neighbours, relative to the power of two below
OF_CPU: Final = 256  # tokens whose logits the CPU computes too


@final
@struct.dataclass
class _AsGiven(KvCodec):
    """Reads caches that another model has written, the newest token's bytes among them, and writes nothing."""

    inner: Any

    def init(self, capacity: int, heads: int, dim: int, dtype: jax.typing.DTypeLike) -> Any:
        """Returns the inner codec's."""
        return self.inner.init(capacity, heads, dim, dtype)

    def fill(self, cache: Any, *_: Any) -> Any:
        """Returns the cache unchanged."""
        return cache

    def push(self, cache: Any, *_: Any) -> Any:
        """Returns the cache unchanged."""
        return cache

    def read(self, cache: Any, position: Any, rope: Any) -> Any:
        """Returns what the inner codec does."""
        return self.inner.read(cache, position, rope)

    def settle(self, cache: Any, position: Any) -> Any:
        """Returns the cache unchanged."""
        del position
        return cache

    def exact_from(self, position: Any) -> Any:
        """Returns what the inner codec does."""
        return self.inner.exact_from(position)


def main() -> None:
    """Compares every recipe that is asked for."""
    arguments = _arguments()
    end = time.monotonic() + arguments.seconds
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__}), flush=True)
    source = load_model(arguments.model or demo_model(default_cache()), dtype="bfloat16")
    windows = np.load(arguments.windows).astype(np.int32)[: arguments.count, : arguments.length]
    for name in arguments.recipes:
        started = time.monotonic()
        model = source
        for part in name.split("+"):
            recipe = load_recipe(part)
            model, _ = run_passes(recipe.passes, model, Context(jax.random.key(recipe.seed)))
        packed = prepare(model if arguments.apart else stack_if_alike(model), Target(arguments.target))
        about = {"recipe": name, "products": describe_products(packed)}
        for figures in _compare(packed, model, windows, arguments):
            print(json.dumps({**about, **figures, "t": round(time.monotonic() - started, 1)}), flush=True)
            if time.monotonic() > end:
                print(json.dumps({**about, "stopped": "no time is left; see --seconds"}), flush=True)
                return


def _compare(packed: Llama, model: Llama, windows: np.ndarray, arguments: argparse.Namespace) -> Iterator[Any]:
    portable = stack_if_alike(model)
    prompts = windows[: arguments.prompts, : arguments.prompt]
    if "logits" in arguments.figures:
        yield _on_the_cpu(portable, windows)
        yield from _logits(packed, portable, windows, arguments.batch)
    if "steps" in arguments.figures:
        yield from _steps(packed, model if arguments.apart else portable, prompts, arguments.tokens)
    if "greedy" in arguments.figures:
        yield from _greedy(packed, portable, prompts, arguments.tokens)


def _on_the_cpu(portable: Llama, windows: np.ndarray) -> dict[str, Any]:
    reference, ids = _float32(portable), jnp.asarray(windows[:1, :OF_CPU])
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(jax.jit(models.forward)(reference, ids))
    truth = np.asarray(jax.jit(models.forward)(*jax.device_put((reference, ids), jax.devices("cpu")[0])))
    return {"figure": "reference on this device, relative to the CPU's", "logits": _relative(ours, truth)}


def _logits(packed: Llama, portable: Llama, windows: np.ndarray, batch: int) -> Iterator[dict[str, Any]]:
    forward, reference = jax.jit(models.forward), _float32(portable)
    found: list[dict[str, Any]] = []
    for start in range(0, len(windows), batch):
        ids = jnp.asarray(windows[start : start + batch])
        with jax.default_matmul_precision("highest"):
            truth = forward(reference, ids)
        found.append(jax.device_get(_distances(forward(packed, ids), truth, ids)))
        if start == 0:
            rounded = jax.device_get(_distances(forward(portable, ids), truth, ids))
            yield {"figure": "logits", "of": "XLA in bfloat16", **_summary([rounded])}
            yield {"figure": "logits", "of": "packed", **_summary(found)}
    yield {"figure": "logits", "of": "packed", **_summary(found)}


@jax.jit
def _distances(found: jax.Array, truth: jax.Array, ids: jax.Array) -> dict[str, jax.Array]:
    """Returns sums and maxima over the logits of some windows, and each window's mean losses."""
    apart = found - truth
    losses = [
        -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(each[:, :-1]), ids[:, 1:, None], axis=-1), axis=(1, 2))
        for each in (found, truth)
    ]
    return {
        "apart": jnp.sum(jnp.square(apart)),
        "norm": jnp.sum(jnp.square(truth)),
        "most": jnp.max(jnp.abs(apart)),
        "largest": jnp.max(jnp.abs(truth)),
        "same": jnp.mean((found.argmax(-1) == truth.argmax(-1)).astype(jnp.float32), axis=1),
        "losses": losses[0],
        "true losses": losses[1],
    }


def _summary(parts: list[dict[str, Any]]) -> dict[str, Any]:
    total = {name: sum(float(part[name]) for part in parts) for name in ("apart", "norm")}
    whole = {name: np.concatenate([part[name] for part in parts]) for name in ("same", "losses", "true losses")}
    ours, theirs = (float(np.exp(whole[name].astype(np.float64).mean())) for name in ("losses", "true losses"))
    return {
        "windows": len(whole["same"]),
        "relative": math.sqrt(total["apart"] / total["norm"]),
        "largest of largest": max(float(part["most"]) for part in parts)
        / max(float(part["largest"]) for part in parts),
        "same first choice": float(whole["same"].mean()),
        "perplexity": ours,
        "reference's": theirs,
        "ratio": ours / theirs,
    }


def _greedy(packed: Llama, portable: Llama, prompts: np.ndarray, tokens: int) -> Iterator[dict[str, Any]]:
    """Yields where what `generate` writes by both parts."""
    given, reference = [prompt.tolist() for prompt in prompts], _float32(portable)
    started = time.monotonic()
    ours = generate(packed, given, max_tokens=tokens).tokens
    yield {"figure": "generated", "tokens": len(ours) * tokens, "seconds, compilation too": time.monotonic() - started}
    with jax.default_matmul_precision("highest"):
        theirs = generate(reference, given, max_tokens=tokens).tokens
    prefill = jax.jit(lambda model, ids, length: models.prefill(model, ids, length, ids.shape[1])[0])
    for index, (prompt, mine, other) in enumerate(zip(given, ours, theirs, strict=True)):
        at = _first_difference(mine, other)
        line: dict[str, Any] = {"figure": "greedy", "prompt": index, "same": tokens if at is None else at}
        if at is not None:
            seen = np.zeros((1, len(prompt) + tokens), np.int32)
            read = prompt + list(other[:at])
            seen[0, : len(read)] = read
            with jax.default_matmul_precision("highest"):
                row = np.asarray(prefill(reference, jnp.asarray(seen), jnp.asarray([len(read)], jnp.int32)))[0]
            line["bfloat16 steps between the two"] = _steps_between(row, other[at], mine[at])
        yield line


def _steps(packed: Llama, model: Llama, prompts: np.ndarray, tokens: int) -> Iterator[dict[str, Any]]:
    """Yields how far steps are from those of the reference over the same bytes, and where choices part."""
    reference = _over_the_bytes_of(packed, _float32(model))
    decode, length = jax.jit(models.decode), prompts.shape[1]
    lengths = jnp.full(len(prompts), length, jnp.int32)
    read = jax.jit(lambda model, ids, lengths: models.prefill(model, ids, lengths, length + tokens))
    logits, cache = read(packed, jnp.asarray(prompts), lengths)
    chosen, apart, norm, gaps = np.asarray(logits).argmax(-1), [], [], []
    for _ in range(1, tokens):
        given, positions = jnp.asarray(chosen, jnp.int32), cache.positions
        logits, cache = decode(packed, given, cache)
        with jax.default_matmul_precision("highest"):
            truth = np.asarray(decode(reference, given, dataclasses.replace(cache, positions=positions))[0])
        found = np.asarray(logits)
        chosen, best = found.argmax(-1), truth.argmax(-1)
        apart.append(np.square(found - truth).sum(-1))
        norm.append(np.square(truth).sum(-1))
        gaps += [_steps_between(truth[row], best[row], chosen[row]) for row in np.flatnonzero(chosen != best)]
    yield {
        "figure": "steps over the same bytes",
        "relative": math.sqrt(np.sum(apart) / np.sum(norm)),
        "relative, worst token": float(np.sqrt(np.max(np.asarray(apart) / np.asarray(norm)))),
        "steps": (tokens - 1) * len(prompts),
        "other choices": len(gaps),
        "bfloat16 steps between the two, largest first": sorted(gaps, reverse=True)[:8],
    }


def _over_the_bytes_of(packed: Llama, reference: Llama) -> Llama:
    """Returns the reference with codecs that read the packed model's caches and write nothing."""

    def with_codec(own: Block, other: Block) -> Block:
        codec: Any = other.self_attn.kv_codec
        if attention_kernel(codec) is not None:
            codec = dataclasses.replace(codec, layout=Layout.PORTABLE)
        return dataclasses.replace(own, self_attn=dataclasses.replace(own.self_attn, kv_codec=_AsGiven(codec)))

    if isinstance(reference.layers, Stacked) and isinstance(packed.layers, Stacked):
        block = with_codec(reference.layers.block, packed.layers.block)
        return dataclasses.replace(reference, layers=dataclasses.replace(reference.layers, block=block))
    pairs = zip(blocks(reference), blocks(packed), strict=True)
    return dataclasses.replace(reference, layers=tuple(with_codec(*pair) for pair in pairs))


def _steps_between(row: np.ndarray, best: int, other: int) -> float:
    step = BFLOAT16_STEP * 2.0 ** math.floor(math.log2(abs(row[best])))
    return float((row[best] - row[other]) / step)


def _relative(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def _first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    return next((at for at, pair in enumerate(zip(left, right, strict=True)) if pair[0] != pair[1]), None)


def _float32(model: Llama) -> Llama:
    """Returns the model with activations in float32; scales stay as they are stored."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, model)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--figures", nargs="*", choices=FIGURES, default=FIGURES)
    parser.add_argument("--apart", action="store_true", help="layers of the packed model as generation has them")
    parser.add_argument("--model", type=Path, help="the GGUF file; the demo's if left out")
    parser.add_argument("--windows", type=Path, required=True, help="a .npy file of token ids")
    parser.add_argument("--count", type=int, help="windows of the perplexity; all if left out")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--batch", type=int, default=4, help="windows at once")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--prompt", type=int, default=160, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to write")
    parser.add_argument("--target", choices=[target.value for target in Target], default=Target.H100.value)
    parser.add_argument("--seconds", type=float, default=300.0, help="after which no figure is begun")
    return parser.parse_args()


if __name__ == "__main__":
    main()
