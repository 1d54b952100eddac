r"""Generation with each KV codec on SmolLM2-135M-Instruct: bytes of the cache, seconds, tokens a second, compilations.

Continues a prompt of real text greedily; the first step of each codec is timed apart, as it compiles. Prints one JSON
line a codec.

    python benchmarks/cache_generation.py [--prompt 1024] [--tokens 256] [--codecs kivi-2 ...]
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
from jquant.kv import DynamicRazorKv, ExactKv, Kivi, KvCodec, PerTokenKv
from jquant.models import set_kv_codec, stack_layers
from jquant.runtime import decode, prefill

CODECS: Final[Mapping[str, KvCodec]] = {
    "exact": ExactKv(),
    "kv4": PerTokenKv(4),
    "kivi-4": Kivi(4, 4),
    "kivi-2": Kivi(2, 2),
    "kivi-2-exact-prompt": Kivi(2, 2, prompt="exact"),
    "dynamic-razor": DynamicRazorKv(),
}


def main() -> None:
    """Generates with every codec that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--codecs", nargs="*", default=list(CODECS))
    arguments = parser.parse_args()
    source = demo_model(default_cache())
    model = load_model(source)
    text = load_text(PYTHON_DOCS, "evaluation")
    windows = token_windows(text, load_tokenizer(source), length=arguments.prompt, count=1)
    tokens, lengths = jnp.asarray(windows.astype(np.int32)), jnp.full(1, arguments.prompt, jnp.int32)
    capacity = arguments.prompt + arguments.tokens
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "command": sys.argv}), flush=True)
    for name in arguments.codecs:
        stacked = stack_layers(set_kv_codec(model, CODECS[name]))
        times, before = [time.monotonic()], decode._cache_size()  # type: ignore[attr-defined]
        logits, cache = jax.block_until_ready(prefill(stacked, tokens, lengths, capacity=capacity))
        nbytes = tree_nbytes(cache)
        times.append(time.monotonic())
        for step in range(arguments.tokens):
            logits, cache = decode(stacked, jnp.argmax(logits, axis=-1), cache)
            if step == 0:
                jax.block_until_ready(logits)
                times.append(time.monotonic())
        assert np.isfinite(np.asarray(logits)).all()
        times.append(time.monotonic())
        figures = {
            "codec": name,
            "cache_bytes": nbytes,
            "prompt_s": times[1] - times[0],
            "first_step_s": times[2] - times[1],
            "tokens_per_s": (arguments.tokens - 1) / (times[3] - times[2]),
            "decode_compilations": decode._cache_size() - before,  # type: ignore[attr-defined]
        }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
