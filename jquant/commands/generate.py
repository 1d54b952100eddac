"""`jquant generate`."""

from collections.abc import Sequence
from typing import Annotated

import jax
from cyclopts import Parameter

from convert import load_tokenizer
from jquant.commands.devices import ONE_DEVICE, Devices, is_first, rows_to_fill
from jquant.commands.display import note, stdout
from jquant.folders import open_for_use
from jquant.machines import TargetName
from jquant.runtime import generate
from jquant.sampling import Sampler
from jquant.targets import describe_products


def run(
    model: str,
    /,
    *,
    prompt: Annotated[Sequence[str], Parameter(negative="")],
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    prefill_chunk: int | None = None,
    target: TargetName = "auto",
    devices: Devices = ONE_DEVICE,
) -> None:
    """Continue prompts; several go through the model together.

    Args:
      model: a jquant checkpoint, a Hugging Face folder, a GGUF file or a hub id.
      prompt: the text to continue; may be given several times.
      max_tokens: the most tokens to write for each prompt.
      temperature: 0 takes the likeliest token, above 0 draws.
      top_k: draw from the likeliest K tokens.
      top_p: draw from the likeliest tokens that have this probability together.
      seed: of the draws.
      prefill_chunk: tokens of the prompts that go through the model at once, to bound memory; all if not given.
      target: whose kernels multiply; auto is the GPU's own for models in bfloat16 on an H100 or H200. With +tokamax,
        prompts attend by tokamax (jquant[tokamax]), not by cuDNN.
      devices: which devices.
    """
    mesh = devices.start()
    sampler = Sampler(temperature, top_k, top_p)
    tokenizer = load_tokenizer(model)
    tree = open_for_use(model, target=target, mesh=mesh)
    if is_first():
        note(f"products by {describe_products(tree)}")
    prompts = [tokenizer.encode(text) for text in prompt]
    written = generate(
        tree,
        prompts + prompts[:1] * rows_to_fill(mesh, len(prompts)),
        max_tokens=max_tokens,
        sampler=sampler,
        stop_tokens=[] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id],
        prefill_chunk=prefill_chunk,
        key=jax.random.key(seed),
    )
    for text, tokens in zip(prompt, written.tokens, strict=False) if is_first() else ():
        stdout().print(text + str(tokenizer.decode(tokens)), markup=False, highlight=False, soft_wrap=True)
