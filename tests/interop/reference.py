"""Logits of transformers' own models; run by the interpreter of `make reference`, which has torch, never imported.

Usage: reference.py FOLDER TOKENS.npy LOGITS.npy [FOLDER TOKENS.npy LOGITS.npy ...]
"""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def write_logits(folder: str, tokens: str, out: str) -> None:
    """Write the float32 logits [batch, tokens, vocab] of a Hugging Face folder on ids [batch, tokens]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(np.load(tokens)).long()).logits
    np.save(out, logits.numpy())


if __name__ == "__main__":
    torch.manual_seed(0)
    arguments = sys.argv[1:]
    for start in range(0, len(arguments), 3):
        write_logits(*arguments[start : start + 3])
