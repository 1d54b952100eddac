"""The loss of next tokens, without the logits of all positions at once."""

from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jquant.models.ends import head
from jquant.models.tree import Llama

_POSITIONS: Final = 256  # whose float32 logits are held at once: 0.13 GB for a vocabulary of 128k


def next_token_losses(
    model: Llama, states: Float[Array, "batch tokens hidden"], tokens: Int[Array, "batch tokens"]
) -> Float[Array, "batch predicted"]:
    """Returns -log p(tokens[t + 1] | tokens up to t) in nats for all t but the last, in float32.

    The head is taken over a few positions at a time; gradients take it again.

    Args:
      model: whose head it is.
      states: what the last block gives, before the final norm.
      tokens: token ids, at least two in a row.

    Example:
      >>> from jquant.models import hidden_states, random_model, tiny_config
      >>> model, tokens = random_model(tiny_config(), jax.random.key(0)), jnp.ones((2, 9), jnp.int32)
      >>> next_token_losses(model, hidden_states(model, tokens), tokens).shape
      (2, 8)
    """
    rows, predicted = tokens.shape[0], tokens.shape[1] - 1
    pieces = -(-predicted // _POSITIONS)
    size = -(-predicted // pieces)
    padding = pieces * size - predicted
    padded = jnp.pad(states[:, :-1], ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, padding)))

    @jax.checkpoint
    def piece_losses(piece: tuple[Array, Array]) -> Array:
        logits = head(model, piece[0]).astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, piece[1][:, :, None], axis=-1)[:, :, 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    by_piece = (
        jnp.moveaxis(padded.reshape(rows, pieces, size, -1), 1, 0),
        jnp.moveaxis(targets.reshape(rows, pieces, size), 1, 0),
    )
    return jnp.moveaxis(jax.lax.map(piece_losses, by_piece), 0, 1).reshape(rows, pieces * size)[:, :predicted]
