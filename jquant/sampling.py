"""From logits to the next token: greedy, or random with temperature, top-k and top-p."""

from dataclasses import dataclass
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jquant.errors import RecipeError
from jquant.types import Key


@dataclass(frozen=True)
class Sampler:
    """Choose the next token of each row; hashable, so that it can be a static argument.

    At temperature 0 the most likely token (the first of equals); otherwise a draw from softmax(logits / temperature),
    cut to the `top_k` most likely tokens, then to the smallest set of the most likely tokens whose probabilities,
    after the first cut, sum to at least `top_p`. Tokens as likely as the last one kept are kept too.

    Attributes:
      temperature: 0 for greedy; above 0 flattens (> 1) or sharpens (< 1) the distribution.
      top_k: how many tokens to keep, or None for all.
      top_p: the probability to keep, in (0, 1], or None for all; the most likely token is always kept.

    Raises:
      RecipeError: a value is out of range, or `top_k` or `top_p` is given for greedy choice, which would ignore it.

    Example:
      >>> Sampler()(jnp.array([[0.0, 2.0, 1.0]]), jax.random.key(0)).tolist()
      [1]
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if not 0.0 <= self.temperature < float("inf"):
            raise RecipeError(f"temperature is {self.temperature}; expected 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise RecipeError(f"top_k is {self.top_k}; expected at least 1, or None to keep all tokens")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise RecipeError(f"top_p is {self.top_p}; expected more than 0 and at most 1, or None to keep all tokens")
        if self.temperature == 0.0 and (self.top_k, self.top_p) != (None, None):
            raise RecipeError(
                f"top_k={self.top_k}, top_p={self.top_p} have no effect at temperature 0; "
                "give a temperature above 0 or leave them out"
            )

    def __call__(self, logits: Float[Array, "batch vocab"], key: Key) -> Int32[Array, "batch"]:
        """Return one token for each row of logits."""
        if self.temperature == 0.0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        scaled = logits.astype(jnp.float32) / self.temperature
        if self.top_k is not None:
            scaled = _cut(scaled, jax.lax.top_k(scaled, min(self.top_k, scaled.shape[-1]))[0][:, -1:])
        if self.top_p is not None:
            scaled = _cut(scaled, _nucleus_threshold(scaled, self.top_p))
        return jax.random.categorical(key, scaled, axis=-1).astype(jnp.int32)


GREEDY: Final = Sampler()


def _cut(logits: Float[Array, "batch vocab"], threshold: Float[Array, "batch 1"]) -> Float[Array, "batch vocab"]:
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def _nucleus_threshold(logits: Float[Array, "batch vocab"], top_p: float) -> Float[Array, "batch 1"]:
    """Return the smallest logit [batch, 1] that is kept: tokens before it have a probability below `top_p` in all."""
    descending = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < top_p).at[:, 0].set(True)
    return jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
