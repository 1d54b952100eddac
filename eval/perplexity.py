"""Perplexity by the protocol of the quantization papers: exp of the mean, over windows, of each window's mean loss.

Each window stands alone: its first token has no context, and its length - 1 further tokens are predicted. GPTQ's
protocol is windows of 2048 tokens, consecutive, from WikiText-2's raw test split:
`token_windows(load_text("wikitext2", "evaluation"), ..., length=2048)`. Losses are computed in float32 from the
model's logits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from jquant.errors import CalibrationError, DataError
from jquant.models import Llama, Sharded, Stacked, hidden_states, next_token_losses

type OnWindow = Callable[[int, int, float], None]  # (windows done, windows in all, perplexity so far)


@dataclass(frozen=True)
class Perplexity:
    """Hold a perplexity and what it was measured on.

    Attributes:
      value: exp(mean of `window_losses`).
      window_losses: mean negative log-likelihood of each window, in nats per token.
      windows: how many windows.
      window_length: tokens in a window.
      tokens: how many tokens were predicted, windows * (window_length - 1).
      kv_prompt: what a window's own queries saw: "exact" keys and values, those "stored" by the KV codec, or
        "streamed", those that decoding would show; several, where layers differ, are joined by "+".
    """

    value: float
    window_losses: tuple[float, ...]
    windows: int
    window_length: int
    tokens: int
    kv_prompt: str


def perplexity(
    model: Llama,
    windows: Integer[np.ndarray, "count length"],
    *,
    batch_size: int = 1,
    on_window: OnWindow | None = None,
) -> Perplexity:
    """Measure the perplexity of a model on windows of tokens; one compilation, whatever their number.

    exp(1 / count * sum_i 1 / (length - 1) * sum_t -log p(window[i, t + 1] | window[i, : t + 1]))

    Args:
      model: the model.
      windows: token ids [count, length].
      batch_size: windows run at once; changes memory and speed, not the value.
      on_window: called after each batch with the windows done, the windows in all and the perplexity so far.

    Raises:
      DataError: there is no window, or ids are outside the model's vocabulary.
      CalibrationError: a window's loss is not finite; it is named.

    Example:
      >>> from jquant.models import random_model, tiny_config
      >>> model = random_model(tiny_config(), jax.random.key(0))
      >>> perplexity(model, np.ones((2, 9), np.int32)).tokens
      16
    """
    count, length = windows.shape
    if count < 1 or length < 2 or batch_size < 1:
        raise DataError(
            f"got {count} windows of {length} tokens in batches of {batch_size}; expected 1 of 2 in 1 at least"
        )
    if windows.min() < 0 or windows.max() >= model.config.vocab_size:
        raise DataError(
            f"windows have token ids from {windows.min()} to {windows.max()}, but the model has ids 0 to "
            f"{model.config.vocab_size - 1}: tokenise the text with the model's own tokenizer"
        )
    losses: list[float] = []
    for start in range(0, count, batch_size):
        batch = windows[start : start + batch_size].astype(np.int32)
        missing = min(batch_size, count) - len(batch)
        padded = np.concatenate([batch, np.repeat(batch[:1], missing, axis=0)])
        losses += _window_losses(model, jnp.asarray(padded)).tolist()[: len(batch)]
        _require_finite(losses)
        if on_window is not None:
            on_window(len(losses), count, _exp_mean(losses))
    return Perplexity(_exp_mean(losses), tuple(losses), count, length, count * (length - 1), kv_prompt(model))


@jax.jit
def _window_losses(model: Llama, windows: Int[Array, "batch length"]) -> Float[Array, "batch"]:
    """Return each window's mean loss."""
    return jnp.mean(next_token_losses(model, hidden_states(model, windows), windows), axis=-1)


def _exp_mean(losses: list[float]) -> float:
    return float(np.exp(np.mean(np.asarray(losses, dtype=np.float64))))


def _require_finite(losses: list[float]) -> None:
    for index, loss in enumerate(losses):
        if not np.isfinite(loss):
            raise CalibrationError(
                f"window {index} has a mean loss of {loss}: the model's weights or activations are not finite; "
                "check the checkpoint, or compute in float32 or bfloat16 rather than float16"
            )


def kv_prompt(model: Llama) -> str:
    """Return what the queries of a prompt see, as `Perplexity.kv_prompt` has it."""
    layers = model.layers.layers if isinstance(model.layers, Sharded) else model.layers
    blocks = (layers.block,) if isinstance(layers, Stacked) else layers
    return "+".join(sorted({block.self_attn.kv_codec.prompt for block in blocks}))
