"""What the queries of a prompt see, by the codec's `prompt` mode."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from jquant.errors import FormatError
from jquant.kv.base import KvCodec, LayerCache, Rope
from jquant.kv.vectors import write
from jquant.types import Leaf


class PromptView(NamedTuple):
    """Hold one or more versions of keys and values, and which of them each query of a prompt or a chunk sees.

    Attributes:
      keys: [versions * seen, heads, dim], after RoPE.
      values: the same.
      positions: int [versions * seen], of the tokens.
      mask: bool [queries, versions * seen]; one version of each token for each query, causality aside.
    """

    keys: Leaf
    values: Leaf
    positions: Leaf
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
    if codec.prompt == "exact":
        return _one_version(*exact, tokens)
    keys, values = (array[:tokens].astype(exact[0].dtype) for array in codec.read(cache, length, rope))
    if codec.prompt == "stored":
        return _one_version(keys, values, tokens)
    return _streamed(codec, (keys, values), exact, jnp.arange(tokens))


def view_chunk(
    codec: KvCodec,
    caches: tuple[LayerCache, LayerCache],
    exact: tuple[Leaf, Leaf],
    span: tuple[Int[Array, ""], Int[Array, ""]],
    rope: Rope,
) -> PromptView:
    """Returns what the queries of a chunk of a prompt see: what `view_prompt` shows the same queries of the whole.

    Streamed, the cache after the chunk holds all that is coded for any query of it, and the cache before the chunk all
    earlier tokens that are exact for one. "stored" needs no more where each token is coded as it comes; of a codec
    that codes tokens together or some tokens behind, it shows what only the end of the prompt decides. "exact" needs
    a cache that is exact itself: what came before is not kept otherwise.

    Args:
      codec: how the cache is kept.
      caches: before and after the chunk was filled in.
      exact: the chunk's keys after RoPE and its values, [tokens, heads, dim].
      span: the position of the chunk's first token, and the real tokens of the prompt.
      rope: of the codec's contract.

    Raises:
      FormatError: the codec's prompt mode is none of its `chunk_prompts`.
    """
    if codec.prompt not in codec.chunk_prompts:
        known = f"give prompt={' or '.join(map(repr, codec.chunk_prompts))}, or" if codec.chunk_prompts else ""
        raise FormatError(
            f"{type(codec).__name__} with prompt={codec.prompt!r} cannot read a prompt in chunks, as they do not tell "
            f"what its queries would see; {known} read the prompt whole"
        )
    (before, after), (start, length) = caches, span
    tokens, dtype = exact[0].shape[0], exact[0].dtype
    keys, values = (array.astype(dtype) for array in codec.read(after, jnp.minimum(length, start + tokens), rope))
    if codec.prompt != "streamed":
        return _one_version(keys, values, tokens)
    earlier = tuple(array.astype(dtype) for array in codec.read(before, start, rope))
    return _streamed(codec, (keys, values), write(earlier, exact, start), start + jnp.arange(tokens))


def _one_version(keys: Leaf, values: Leaf, queries: int) -> PromptView:
    seen = keys.shape[0]
    return PromptView(keys, values, jnp.arange(seen), jnp.ones((queries, seen), jnp.bool_))


def _streamed(
    codec: KvCodec, coded: tuple[Leaf, Leaf], exact: tuple[Leaf, ...], positions: Int[Array, "queries"]
) -> PromptView:
    """Lays three versions of every token behind each other; the mask takes one of them for each query."""
    (keys, values), (exact_keys, exact_values) = coded, exact
    seen = jnp.arange(keys.shape[0])
    exact_key, exact_value = (first[:, None] <= seen[None, :] for first in codec.exact_from(positions))
    masks = ~exact_value, exact_value & ~exact_key, exact_key
    return PromptView(
        jnp.concatenate([keys, keys, exact_keys]),
        jnp.concatenate([values, exact_values, exact_values]),
        jnp.tile(seen, len(masks)),
        jnp.concatenate(masks, axis=1),
    )
