r"""Generation with each KV codec on SmolLM2-135M-Instruct: bytes of the cache, seconds, tokens a second, compilations.

Continues a prompt of real text greedily; the first step of each codec is timed apart, as it compiles. Prints one JSON
line a codec, and stops if a codec needs more than one program for its prompt or for its steps.

    python benchmarks/cache_generation.py [--prompt 1024] [--tokens 256] [--prefill-chunk 256] [--codecs kivi-2 ...]
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np

from convert import default_cache, demo_model, load_model, load_tokenizer
from jquant.data import PYTHON_DOCS, load_text, token_windows
from jquant.formats import tree_nbytes
from jquant.kv import DynamicRazorKv, ExactKv, Kivi, PerTokenKv
from jquant.kv_passes import CalibrateKvQuant, CalibrateRazorKv, SetKvCodec
from jquant.models import stack_layers
from jquant.passes import Context, ModelPass, run_passes
from jquant.runtime import decode, prefill

CODECS: Final[Mapping[str, ModelPass]] = {
    "exact": SetKvCodec(ExactKv()),
    "kv4": SetKvCodec(PerTokenKv(4)),
    "kivi-4": SetKvCodec(Kivi(4, 4)),
    "kivi-2": SetKvCodec(Kivi(2, 2)),
    "kivi-2-exact-prompt": SetKvCodec(Kivi(2, 2, prompt="exact")),
    "razor": CalibrateRazorKv(),
    "kvquant-4": CalibrateKvQuant(4),
    "kvquant-2": CalibrateKvQuant(2),
    "dynamic-razor": SetKvCodec(DynamicRazorKv()),
}
CALIBRATION: Final = (4, 512)  # windows and their tokens, enough to time a calibrated codec


def programs() -> tuple[int, int]:
    """Returns how many programs were compiled so far for prompts and for steps."""
    return prefill._cache_size(), decode._cache_size()  # type: ignore[attr-defined]


def main() -> None:
    """Generates with every codec that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prefill-chunk", type=int, help="tokens of the prompt at once; all if left out")
    parser.add_argument("--codecs", nargs="*", default=list(CODECS))
    arguments = parser.parse_args()
    source = demo_model(default_cache())
    model = load_model(source)
    text = load_text(PYTHON_DOCS, "evaluation")
    tokenizer = load_tokenizer(source)
    windows = token_windows(text, tokenizer, length=arguments.prompt, count=1)
    count, length = CALIBRATION
    seen = token_windows(load_text(PYTHON_DOCS, "calibration"), tokenizer, length=length, count=count, seed=0)
    context = Context(jax.random.key(0), jnp.asarray(seen))
    tokens, lengths = jnp.asarray(windows.astype(np.int32)), jnp.full(1, arguments.prompt, jnp.int32)
    capacity = arguments.prompt + arguments.tokens
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "command": sys.argv}), flush=True)
    for name in arguments.codecs:
        stacked = stack_layers(run_passes((CODECS[name],), model, context)[0])
        times, before = [time.monotonic()], programs()
        logits, cache = jax.block_until_ready(
            prefill(stacked, tokens, lengths, capacity=capacity, chunk=arguments.prefill_chunk)
        )
        nbytes = tree_nbytes(cache)
        times.append(time.monotonic())
        for step in range(arguments.tokens):
            logits, cache = decode(stacked, jnp.argmax(logits, axis=-1), cache)
            if step == 0:
                jax.block_until_ready(logits)
                times.append(time.monotonic())
        assert np.isfinite(np.asarray(logits)).all()
        times.append(time.monotonic())
        compiled = [now - then for now, then in zip(programs(), before, strict=True)]
        assert compiled == [1, 1], f"{name} compiled {compiled} programs for its prompt and its steps"
        figures = {
            "codec": name,
            "cache_bytes": nbytes,
            "prompt_s": times[1] - times[0],
            "first_step_s": times[2] - times[1],
            "tokens_per_s": (arguments.tokens - 1) / (times[3] - times[2]),
            "prompt_programs": compiled[0],
            "step_programs": compiled[1],
        }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
