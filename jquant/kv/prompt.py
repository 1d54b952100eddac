"""What the queries of a prompt see, by the codec's `prompt` mode."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from jquant.kv.base import KvCodec, LayerCache, Rope
from jquant.types import Leaf


class PromptView(NamedTuple):
    """Hold one or more versions of a prompt's keys and values, and which of them each query sees.

    Attributes:
      keys: [versions * tokens, heads, dim], after RoPE.
      values: the same.
      mask: bool [tokens, versions * tokens]; one version of each token for each query, causality aside.
    """

    keys: Leaf
    values: Leaf
    mask: Leaf


def view_prompt(
    codec: KvCodec, cache: LayerCache, exact: tuple[Leaf, Leaf], length: Int[Array, ""], rope: Rope
) -> PromptView:
    """Returns what the queries of one prompt see.

    Streamed, a query at p sees keys coded before `exact_from(p)` and exact from there on, and values likewise, where
    values stay exact longer: three versions of every token lie behind each other, both coded, the value exact, both
    exact, and the mask takes one of them. Attention then costs three times as much.

    Args:
      codec: how the cache is kept.
      cache: filled with the prompt.
      exact: keys after RoPE and values, [tokens, heads, dim].
      length: real tokens of the prompt.
      rope: of the codec's contract.
    """
    tokens = exact[0].shape[0]
    everything = jnp.ones((tokens, tokens), jnp.bool_)
    if codec.prompt == "exact":
        return PromptView(*exact, everything)
    keys, values = (array[:tokens].astype(exact[0].dtype) for array in codec.read(cache, length, rope))
    if codec.prompt == "stored":
        return PromptView(keys, values, everything)
    positions = jnp.arange(tokens)
    exact_key, exact_value = (first[:, None] <= positions[None, :] for first in codec.exact_from(positions))
    masks = ~exact_value, exact_value & ~exact_key, exact_key
    return PromptView(
        jnp.concatenate([keys, keys, exact[0]]),
        jnp.concatenate([values, exact[1], exact[1]]),
        jnp.concatenate(masks, axis=1),
    )
