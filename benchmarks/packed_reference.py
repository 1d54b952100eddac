r"""The reference of `benchmarks/packed_agreement.py`, made on a CPU: the same weights in float32 arithmetic.

SmolLM2-135M-Instruct is quantized by a recipe that needs no calibration. One small file for each recipe holds

    losses              each window's mean loss
    places, logits      (window, position) of a few logits, and them, float16
    tokens              what each prompt is continued by, greedily, behind the first tokens of the first windows
    top, top_logits     at each of these tokens, the best eight and their logits
    digest              of every array of the quantized model, so that another machine's codes are known to be the same

    JAX_PLATFORMS=cpu PYTHONPATH=. python benchmarks/packed_reference.py --windows FILE.npy --out FOLDER [--recipes ...]
"""

import argparse
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from convert import default_cache, demo_model, load_model
from jquant import models
from jquant.folders import stack_if_alike
from jquant.models import Llama
from jquant.passes import Context, run_passes
from jquant.recipe import load_recipe

RECIPES: Final = ("rtn-w4g64", "rtn-w4g64+kv4", "quarot-w4a4-rtn+kv4")
PROMPTS: Final = 10
PROMPT: Final = 160  # tokens of each
TOKENS: Final = 128  # written behind each
TOP: Final = 8
PLACES: Final = 16  # whose logits are kept
PIECES: Final = 8  # of a window, so that its logits are never held whole


def main() -> None:
    """Makes the file of every recipe."""
    arguments = _arguments()
    windows = np.load(arguments.windows).astype(np.int32)[: arguments.count]
    if len(windows) < PROMPTS:
        raise SystemExit(f"{len(windows)} windows: {PROMPTS} at least, as so many prompts are their first tokens")
    for name, model in quantized(arguments.recipes, arguments.model):
        reference = in_float32(stack_if_alike(model))
        written = _write(reference, windows[:PROMPTS, :PROMPT])
        losses, places, logits = _read(reference, windows)
        arguments.out.mkdir(parents=True, exist_ok=True)
        found = {"digest": digest(model), "losses": losses, "places": places, "logits": logits, **written}
        np.savez_compressed(arguments.out / f"{name}.npz", **found)
        print(f"{name}: perplexity {math.exp(losses.mean()):.4f} over {len(losses)} windows", flush=True)


def quantized(names: list[str], file: Path | None) -> Iterator[tuple[str, Llama]]:
    """Yields the model in bfloat16 by each recipe, layers apart; recipes share what they begin with alike."""
    done = {"": load_model(file or demo_model(default_cache()), dtype="bfloat16")}
    for name in names:
        before = ""
        for part in name.split("+"):
            path = f"{before}+{part}".lstrip("+")
            if path not in done:
                recipe = load_recipe(part)
                done[path], _ = run_passes(recipe.passes, done[before], Context(jax.random.key(recipe.seed)))
            before = path
        yield name, done[name]


def in_float32(model: Llama) -> Llama:
    """Returns the model with activations in float32; scales stay as they are stored."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, model)


def digest(model: Llama) -> np.ndarray:
    """Returns the SHA-256 of all arrays."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(model):
        found.update(np.asarray(leaf).tobytes())
    return np.frombuffer(found.digest(), np.uint8)


def _write(model: Llama, prompts: np.ndarray) -> dict[str, Any]:
    read = jax.jit(models.prefill, static_argnums=3)
    step = jax.jit(models.decode, donate_argnums=2)
    lengths = jnp.full(len(prompts), prompts.shape[1], jnp.int32)
    logits, cache = read(model, jnp.asarray(prompts), lengths, prompts.shape[1] + TOKENS)
    best, values = [], []
    for index in range(TOKENS):
        row = np.asarray(logits)
        best.append(np.argsort(-row, axis=-1, kind="stable")[:, :TOP])
        values.append(np.take_along_axis(row, best[-1], axis=1))
        if index < TOKENS - 1:
            logits, cache = step(model, jnp.asarray(best[-1][:, 0], jnp.int32), cache)
    top = np.stack(best, axis=1).astype(np.int32)
    return {"tokens": top[..., 0], "top": top, "top_logits": np.stack(values, axis=1).astype(np.float32)}


def _read(model: Llama, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    length = windows.shape[1]
    steps = np.arange(PLACES)
    places = np.stack([steps * max(1, len(windows) // PLACES), (steps + 1) * (length // PLACES) - 1], axis=1)
    places = places[places[:, 0] < len(windows)].astype(np.int32)
    losses, logits, run = [], [], jax.jit(_losses)
    for index, window in enumerate(windows):
        loss, states = run(model, jnp.asarray(window[None]))
        losses.append(float(loss))
        logits += [np.asarray(models.head(model, states[0, at])) for _, at in places[places[:, 0] == index]]
        print(f"{index + 1} of {len(windows)}: {math.exp(np.mean(losses)):.4f}", flush=True)
    return np.asarray(losses), places, np.stack(logits).astype(np.float16)


def _losses(model: Llama, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    states = models.hidden_states(model, ids)
    targets = jnp.concatenate([ids[0, 1:], ids[0, :1]])

    def piece(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = models.head(model, one[0])
        return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, one[1][:, None], axis=-1)[:, 0]

    cut = (states[0].reshape(PIECES, -1, states.shape[-1]), targets.reshape(PIECES, -1))
    return jnp.mean(jax.lax.map(piece, cut).reshape(-1)[:-1]), states


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--model", type=Path, help="the GGUF file; the demo's if left out")
    parser.add_argument("--windows", type=Path, required=True, help="a .npy file of token ids")
    parser.add_argument("--count", type=int, help="windows; all if left out")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the files")
    return parser.parse_args()


if __name__ == "__main__":
    main()
