"""Logits of transformers' own models; run by the interpreter of `make reference`, which has torch, never imported.

Usage: reference.py DTYPE FOLDER TOKENS.npy LOGITS.npy [DTYPE FOLDER TOKENS.npy LOGITS.npy ...]
"""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def write_logits(dtype: str, folder: str, tokens: str, out: str) -> None:
    """Write the logits [batch, tokens, vocab] of a Hugging Face folder on ids [batch, tokens], computed in `dtype`."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager")
    model = loaded.eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(np.load(tokens)).long()).logits
    np.save(out, logits.numpy())


if __name__ == "__main__":
    torch.manual_seed(0)
    arguments = sys.argv[1:]
    for start in range(0, len(arguments), 4):
        write_logits(*arguments[start : start + 4])
