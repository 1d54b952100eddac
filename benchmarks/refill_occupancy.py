"""Share of row-steps that wrote a token of a text: of rows that are refilled, and of batches that wait.

    python -m benchmarks.refill_occupancy [--prompts 256] [--rows 16] [--max-tokens 256]

A random model of 4 layers writes drawn texts whose lengths are geometric, as each of 128 tokens may be the end. A batch
that waits is `complete` of as many prompts as there are rows; its draws are others, as a prompt's place in the call is
its key. One line of JSON for each way.
"""

import argparse
import dataclasses
import itertools
import json
import time
from typing import Any

import jax
import numpy as np

from eval.completion import Completion, Ending, complete
from jquant.models import Llama, random_model, stack_layers, tiny_config
from jquant.sampling import Sampler

_WIDTH = 32  # of prompts, padding counted: those of 9 to 32 tokens share one shape


class Characters:
    """Turn ids into characters, one each."""

    def decode(self, token_ids: Any, /, **options: Any) -> str:
        """Return the text of token ids."""
        del options
        return "".join(chr(1000 + token) for token in token_ids)


def measure(model: Llama, parts: list[list[list[int]]], ending: Ending, rows: int) -> tuple[dict[str, Any], list[str]]:
    """Complete parts one after another, twice, the first time to compile; return figures and texts."""
    for _ in range(2):
        run: list[int] = []
        found: list[Completion] = []
        started = time.monotonic()
        for part in parts:
            found += complete(model, Characters(), part, ending, batch_tokens=rows * _WIDTH, on_steps=run.append)
        seconds = time.monotonic() - started
    texts = [one.text for one in found]
    useful = sum(max(0, len(text) - 1) for text in texts)  # the first token is the prompt's
    figures = {"row_steps": sum(run), "useful": useful, "occupancy": round(useful / sum(run), 4)}
    return figures | {"seconds": round(seconds, 2), "tokens_per_second": round(useful / seconds, 1)}, texts


def main() -> None:
    """Measure both ways on the same prompts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=256)
    given = parser.parse_args()
    config = dataclasses.replace(tiny_config(), num_hidden_layers=4, max_position_embeddings=given.max_tokens + _WIDTH)
    model = stack_layers(random_model(config, jax.random.key(0)))
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, 128, generator.integers(9, _WIDTH + 1)).tolist() for _ in range(given.prompts)]
    ending = Ending(token=10, max_tokens=given.max_tokens, sampler=Sampler(1.0))
    waiting = [list(part) for part in itertools.batched(prompts, given.rows)]
    for way, parts in (("refilled", [prompts]), ("waiting", waiting)):
        figures, texts = measure(model, parts, ending, given.rows)
        lengths = {"mean_tokens": round(sum(map(len, texts)) / len(texts), 1), "longest": max(map(len, texts))}
        print(json.dumps({"way": way, "prompts": given.prompts, "rows": given.rows, **figures, **lengths}), flush=True)


if __name__ == "__main__":
    main()
