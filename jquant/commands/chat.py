"""`jquant chat`."""

from typing import Any

import jax
from rich.console import Console

from convert import load_tokenizer
from eval import Message, reply
from jquant.commands.display import note, stdout
from jquant.folders import open_for_use
from jquant.sampling import Sampler
from jquant.targets import TargetName, describe_products


def run(
    model: str,
    /,
    *,
    system: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    target: TargetName = "auto",
) -> None:
    """Talk with a chat model by its own template; end with an empty line, Ctrl-D or Ctrl-C.

    Args:
      model: a jquant checkpoint, a Hugging Face folder, a GGUF file or a hub id.
      system: what the model is told first; the template's own if not given.
      max_tokens: the most tokens of an answer.
      temperature: 0 takes the likeliest token, above 0 draws.
      top_k: draw from the likeliest K tokens.
      top_p: draw from the likeliest tokens that have this probability together.
      seed: of the draws.
      target: whose kernels multiply; auto is the GPU's own for models in bfloat16 on an H100 or H200.
    """
    sampler, console = Sampler(temperature, top_k, top_p), stdout()
    tokenizer: Any = load_tokenizer(model)
    tree = open_for_use(model, target=target)
    note(f"products by {describe_products(tree)}")
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    while question := _ask(console):
        messages.append({"role": "user", "content": question})
        key = jax.random.fold_in(jax.random.key(seed), len(messages))
        answer = ""
        for piece in reply(tree, tokenizer, messages, max_tokens=max_tokens, sampler=sampler, key=key):
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
            answer += piece
        console.print()
        messages.append({"role": "assistant", "content": answer})


def _ask(console: Console) -> str:
    """Reads one line; "" at the end of the input."""
    try:
        return console.input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
