r"""Greedy tokens of a jquant checkpoint and of transformers on its export: how many of the first tokens are the same.

Both continue the same prompts in float32, transformers by the interpreter of `make reference`. Prints one JSON line for
each prompt, and one for all.

    jquant export CHECKPOINT FOLDER --format compressed-tensors
    python benchmarks/greedy_agreement.py CHECKPOINT FOLDER [--tokens 64] [--python .venv-reference/bin/python]

The result of 2026-11-22 is of SmolLM2-135M-Instruct quantized with `--recipe gptq-w4g64`, calibration.samples=16,
calibration.length=512 and a symmetric grid.
"""

import argparse
import json
import subprocess
from typing import Final

from convert import load_tokenizer
from jquant.folders import open_for_use
from jquant.runtime import generate

PROMPTS: Final = (
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea,",
    "The three laws of thermodynamics say that",
    "In 1969, astronauts",
    "To make bread, you need",
    "The difference between a list and a tuple in Python is",
    "My favourite book is",
    "Photosynthesis is the process by which",
)
# Reads {folder, prompts, tokens} on stdin, writes the continuations on stdout.
THEIRS: Final = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
job = json.load(sys.stdin)
model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32).eval()
written = []
for prompt in job["prompts"]:
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": job["tokens"], "min_new_tokens": job["tokens"]}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **settings)
    written.append(output[0, len(prompt):].tolist())
json.dump(written, sys.stdout)
"""


def main() -> None:
    """Continues every prompt on both sides."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--python", default=".venv-reference/bin/python")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.checkpoint)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    ours = generate(open_for_use(arguments.checkpoint), prompts, max_tokens=arguments.tokens).tokens
    job = {"folder": arguments.folder, "prompts": prompts, "tokens": arguments.tokens}
    done = subprocess.run(
        [arguments.python, "-c", THEIRS], input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True
    )
    agreed = 0
    for text, mine, other in zip(PROMPTS, ours, json.loads(done.stdout), strict=True):
        pairs = list(zip(mine, other, strict=True))
        same = next((index for index, (one, two) in enumerate(pairs) if one != two), len(pairs))
        agreed += same == arguments.tokens
        print(json.dumps({"prompt": text, "same_tokens": same, "text": tokenizer.decode(mine)[:60]}))
    print(json.dumps({"prompts": len(PROMPTS), "all_tokens_same": agreed, "tokens": arguments.tokens}))


if __name__ == "__main__":
    main()
