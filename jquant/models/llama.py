"""The forward pass: pure functions that read the tree. None is jitted here; the runtime and the drivers do that."""

from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jquant.errors import DataError, FormatError
from jquant.formats import DATA
from jquant.kv import (
    LayerCache,
    PromptView,
    append_fault,
    attend_packed,
    attention_kernel,
    step_packed,
    view_chunk,
    view_prompt,
)
from jquant.models.block import Taps, make_rope, run_block, stream_block
from jquant.models.config import LlamaConfig
from jquant.models.ends import embed, head, project
from jquant.models.layers import attention, causal_mask, rope_angles
from jquant.models.mesh import on_mesh, replicate
from jquant.models.prompts import attend_prompt
from jquant.models.stream import Stream, add_norm, layout_of_norms
from jquant.models.tree import Block, Llama, Sharded, Stacked
from jquant.types import Leaf

type Apply = Callable[[Block, Any, Any], tuple[Any, Any]]
_attend_packed: Final = jax.jit(attend_packed)  # so that layers of one shape share one kernel, traced and lowered once
_step_packed: Final = jax.jit(step_packed)  # likewise


@struct.dataclass
class Cache:
    """Keys and values of a batch.

    Attributes:
      layers: a tuple of layer caches, or one with a leading layer axis where the model's layers are stacked;
        every leaf's next axis is the batch.
      positions: int32 [batch], the position that each row's next token takes.
      capacity: tokens that each row can hold, static.
    """

    layers: Any
    positions: Leaf
    capacity: int = struct.field(pytree_node=False)


def forward(model: Llama, tokens: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens vocab"]:
    """Returns the logits of every position of whole sequences; no cache is kept."""
    return head(model, hidden_states(model, tokens))


def hidden_states(
    model: Llama, tokens: Int[Array, "batch tokens"], lengths: Int[Array, "batch"] | None = None
) -> Float[Array, "batch tokens hidden"]:
    """Returns what the last block gives, before the final norm.

    Args:
      model: the model.
      tokens: left-aligned sequences, right-padded with any token.
      lengths: real tokens of each row; None where there is no padding. States behind a row's length mean nothing.
    """
    if lengths is None:
        lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    if isinstance(model.layers, Sharded):
        more = -tokens.shape[0] % model.layers.mesh.shape[DATA]
        rows = jnp.pad(tokens, ((0, more), (0, 0))), jnp.pad(lengths, (0, more), constant_values=1)
        states = on_mesh(model, lambda own, rows, _: (hidden_states(own, *rows), None), rows)[0]
        return replicate(states, model.layers)[: tokens.shape[0]]

    def apply(
        layer: Block, x: Float[Array, "batch tokens hidden"], _: None
    ) -> tuple[Float[Array, "batch tokens hidden"], None]:
        return prompt_block(layer, x, lengths, tokens.shape[1], model.config)[0], None

    return _through_layers(model, embed(model, tokens), None, apply)[0]


def prefill(
    model: Llama,
    tokens: Int[Array, "batch tokens"],
    lengths: Int[Array, "batch"],
    capacity: int,
    chunk: int | None = None,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Reads prompts and fills a cache, at once or a chunk at a time.

    In chunks, activations are held for one chunk alone and only as many chunks run as the longest prompt has; the
    result is that of the whole prompt, but for input quantizers that look across tokens, which see one chunk.

    Args:
      model: the model.
      tokens: left-aligned prompts, right-padded with any token.
      lengths: real tokens of each row, at least 1.
      capacity: tokens that the cache holds for each row.
      chunk: tokens that go through the model at once; None for all.

    Returns:
      The logits after each row's last real token, and the cache.

    Raises:
      DataError: the prompts, padding counted, are longer than the capacity; in whole chunks, if there are chunks.
      FormatError: a codec's prompt mode needs the whole prompt, or a chunk has no token.
    """
    if chunk is not None and chunk < 1:
        raise FormatError(f"chunks of {chunk} tokens: give 1 at least, or None to read prompts whole")
    padding = 0 if chunk is None else -tokens.shape[1] % chunk
    need = tokens.shape[1] + padding
    if need > capacity:
        raise DataError(
            f"prompts of {need} tokens, padding counted, for a cache of {capacity}: give capacity="
            f"{need} at least, and one more for each token to come"
        )
    if isinstance(model.layers, Sharded):
        return _prefill_on_mesh(model, tokens, lengths, capacity, chunk)
    if chunk is not None:
        return _prefill_chunks(model, jnp.pad(tokens, ((0, 0), (0, padding))), lengths, capacity, chunk)

    def apply(
        layer: Block, x: Float[Array, "batch tokens hidden"], _: None
    ) -> tuple[Float[Array, "batch tokens hidden"], LayerCache]:
        x, cache, _taps = prompt_block(layer, x, lengths, capacity, model.config)
        return x, cache

    x, layers = _through_layers(model, embed(model, tokens), None, apply)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return head(model, last), Cache(layers=layers, positions=lengths.astype(jnp.int32), capacity=capacity)


def _prefill_on_mesh(
    model: Llama, tokens: Int[Array, "batch tokens"], lengths: Int[Array, "batch"], capacity: int, chunk: int | None
) -> tuple[Float[Array, "batch vocab"], Cache]:
    sharded = model.layers
    assert isinstance(sharded, Sharded)

    def own(smaller: Llama, rows: tuple[Array, Array], _: None) -> tuple[Any, Any]:
        logits, cache = prefill(smaller, rows[0], rows[1], capacity, chunk)
        return logits, cache.layers

    logits, layers = on_mesh(model, own, (tokens, lengths))
    return replicate(logits, sharded), Cache(layers, lengths.astype(jnp.int32), capacity)


def _prefill_chunks(
    model: Llama, tokens: Int[Array, "batch tokens"], lengths: Int[Array, "batch"], capacity: int, chunk: int
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Runs a loop over as many chunks as the longest prompt has; it carries the caches and each row's last state."""

    def read(index: Int[Array, ""], state: tuple[Array, Any]) -> tuple[Array, Any]:
        last, layers = state
        start = index * chunk

        def apply(
            layer: Block, x: Float[Array, "batch chunk hidden"], cache: LayerCache
        ) -> tuple[Float[Array, "batch chunk hidden"], LayerCache]:
            return chunk_block(layer, x, cache, (start, lengths), model.config)

        part = jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        x, layers = _through_layers(model, embed(model, part), layers, apply)
        at = lengths - 1 - start
        found = jnp.take_along_axis(x, jnp.clip(at, 0, chunk - 1)[:, None, None], axis=1)[:, 0]
        return jnp.where(((at >= 0) & (at < chunk))[:, None], found, last), layers

    rows = tokens.shape[0]
    states = jnp.zeros((rows, model.config.hidden_size), model.config.residual_dtype(model.embed_tokens.dtype))
    start = states, empty_cache(model, rows, capacity).layers
    last, layers = jax.lax.fori_loop(0, -(-jnp.max(lengths) // chunk), read, start)
    return head(model, last), Cache(layers=layers, positions=lengths.astype(jnp.int32), capacity=capacity)


def empty_cache(model: Llama, rows: int, capacity: int) -> Cache:
    """Returns the caches of all layers with nothing in them.

    Args:
      model: the model.
      rows: sequences of the batch.
      capacity: tokens that each of them can hold.
    """
    config, dtype = model.config, model.embed_tokens.dtype
    positions = jnp.zeros(rows, jnp.int32)
    if isinstance(model.layers, Sharded):
        layers = on_mesh(model, lambda own, at, _: (at, empty_cache(own, len(at), capacity).layers), positions)[1]
        return Cache(layers=layers, positions=positions, capacity=capacity)

    def make(layer: Block) -> LayerCache:
        one = layer.self_attn.kv_codec.init(capacity, config.num_key_value_heads, config.head_dim, dtype)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rows, *leaf.shape)), one)

    layers = (
        jax.vmap(make)(model.layers.block)
        if isinstance(model.layers, Stacked)
        else tuple(make(layer) for layer in model.layers)
    )
    return Cache(layers=layers, positions=positions, capacity=capacity)


def decode(model: Llama, tokens: Int[Array, "batch"], cache: Cache) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Reads one token for each row; returns the logits after it and the cache one position on.

    A row whose cache is full has logits of NaN: its token could not be kept.
    """
    if isinstance(model.layers, Sharded):

        def own(smaller: Llama, rows: Any, layers: Any) -> tuple[Any, Any]:
            tokens, positions = rows
            logits, after = decode(smaller, tokens, Cache(layers, positions, cache.capacity))
            return logits, after.layers

        logits, layers = on_mesh(model, own, (tokens, cache.positions), cache.layers)
        positions = replicate(cache.positions + 1, model.layers)
        return replicate(logits, model.layers), Cache(layers, positions, cache.capacity)

    x, layers = _step_layers(model, Stream(embed(model, tokens[:, None])), cache)
    last = model.layers.block if isinstance(model.layers, Stacked) else model.layers[-1]
    _, normed = add_norm(x, model.norm, model.config, layout_of_norms(last.self_attn.kv_codec))
    assert isinstance(normed, jax.Array), "no kernel begins the last norm"
    logits = project(model, normed[:, 0])
    room = (cache.positions < cache.capacity)[:, None]
    kept = Cache(layers=layers, positions=cache.positions + 1, capacity=cache.capacity)
    return jnp.where(room, logits, jnp.full_like(logits, jnp.nan)), kept


def prompt_block(
    layer: Block,
    x: Float[Array, "batch tokens hidden"],
    lengths: Int[Array, "batch"],
    capacity: int,
    config: LlamaConfig,
) -> tuple[Float[Array, "batch tokens hidden"], LayerCache, Taps]:
    """Runs one block over prompts that start at position 0.

    Returns:
      The block's output, the filled layer cache (batch first) and the taps.
    """
    codec = layer.self_attn.kv_codec
    rope = make_rope(layer.self_attn, config)
    positions = jnp.arange(x.shape[1])
    valid = positions[None].astype(lengths.dtype) < lengths[:, None]

    def store(
        keys: Float[Array, "tokens heads dim"], values: Float[Array, "tokens heads dim"], length: Int[Array, ""]
    ) -> LayerCache:
        empty = codec.init(capacity, keys.shape[1], keys.shape[2], keys.dtype)
        return codec.fill(empty, keys, values, length, rope)

    def attend(
        queries: Float[Array, "batch tokens heads dim"],
        keys: Float[Array, "batch tokens kv_heads dim"],
        values: Float[Array, "batch tokens kv_heads dim"],
    ) -> tuple[Float[Array, "batch tokens heads dim"], LayerCache]:
        cache = jax.vmap(store)(keys, values, lengths)
        rotate = jax.vmap(lambda heads: rope(heads, positions))
        rotated = rotate(keys)
        view = jax.vmap(lambda one, key, value, length: view_prompt(codec, one, (key, value), length, rope))(
            cache, rotated, values, lengths
        )
        return attend_prompt(rotate(queries), view, codec, config), cache

    return run_block(layer, x, valid, attend, config)


def chunk_block(
    layer: Block,
    x: Float[Array, "batch chunk hidden"],
    cache: LayerCache,
    span: tuple[Int[Array, ""], Int[Array, "batch"]],
    config: LlamaConfig,
) -> tuple[Float[Array, "batch chunk hidden"], LayerCache]:
    """Runs one block over a chunk of prompts.

    Args:
      layer: the block.
      x: the chunk's hidden states.
      cache: holds the tokens before the chunk, batch first.
      span: the position of the chunk's first token, and the real tokens of each row's prompt.
      config: of the model.

    Returns:
      The block's output and the cache with the chunk in it.
    """
    codec = layer.self_attn.kv_codec
    rope = make_rope(layer.self_attn, config)
    start, lengths = span
    positions = start + jnp.arange(x.shape[1])
    valid = positions[None].astype(lengths.dtype) < lengths[:, None]

    def store(
        before: LayerCache,
        keys: Float[Array, "chunk heads dim"],
        values: Float[Array, "chunk heads dim"],
        length: Int[Array, ""],
    ) -> tuple[LayerCache, PromptView]:
        after = codec.fill(before, keys, values, length, rope, start)
        return after, view_chunk(codec, (before, after), (rope(keys, positions), values), (start, length), rope)

    def attend(
        queries: Float[Array, "batch chunk heads dim"],
        keys: Float[Array, "batch chunk kv_heads dim"],
        values: Float[Array, "batch chunk kv_heads dim"],
    ) -> tuple[Float[Array, "batch chunk heads dim"], LayerCache]:
        after, view = jax.vmap(store)(cache, keys, values, lengths)
        rotated = jax.vmap(lambda heads: rope(heads, positions))(queries)
        return attend_prompt(rotated, view, codec, config, start), after

    x, filled, _ = run_block(layer, x, valid, attend, config)
    return x, filled


def step_block(
    layer: Block,
    x: Stream,
    cache: LayerCache,
    positions: Int[Array, "batch"],
    config: LlamaConfig,
    following: Leaf | None = None,
) -> tuple[Stream, LayerCache]:
    """Runs one block over one token for each row: push, read and attend, settle; `following` as of `stream_block`."""
    codec, rotation = layer.self_attn.kv_codec, layer.self_attn.query_key_rotation
    rope = make_rope(layer.self_attn, config)
    packed = attention_kernel(codec) if config.sliding_window is None else None

    def attend(
        queries: Float[Array, "batch tokens heads dim"],
        keys: Float[Array, "batch tokens kv_heads dim"],
        values: Float[Array, "batch tokens kv_heads dim"],
    ) -> tuple[Float[Array, "batch tokens heads dim"], LayerCache]:
        if packed is not None and append_fault(codec, rotation, queries.dtype) is None:
            angles = rope_angles(positions, config.rope, config.head_dim)
            token = queries[:, 0], keys[:, 0], values[:, 0]
            context, kept = _step_packed(packed, cache, token, angles, positions, rotation)
            return context[:, None], kept
        pushed = jax.vmap(lambda one, key, value, at: codec.push(one, key[0], value[0], at, rope))(
            cache, keys, values, positions
        )
        rotated = jax.vmap(lambda query, at: rope(query, at[None]))(queries, positions)
        if packed is not None:
            context = _attend_packed(packed, pushed, rotated[:, 0], positions)[:, None]
            return context, jax.vmap(codec.settle)(pushed, positions)
        seen_keys, seen_values = jax.vmap(lambda one, at: codec.read(one, at, rope))(pushed, positions)
        slots = jnp.arange(seen_keys.shape[1])
        mask = jax.vmap(lambda at: causal_mask(at[None], slots, config.sliding_window))(positions)
        context = attention(rotated, seen_keys, seen_values, mask)
        return context, jax.vmap(codec.settle)(pushed, positions)

    y, cache, _ = stream_block(layer, x, None, attend, config, layout_of_norms(codec), following)
    return y, cache


def _step_layers(model: Llama, x: Stream, cache: Cache) -> tuple[Stream, Any]:
    """Runs all blocks over one token for each row; those that lie apart begin the next one's norm."""
    if isinstance(model.layers, tuple):
        followings, kept = [*(layer.input_layernorm for layer in model.layers[1:]), None], []
        for layer, own, following in zip(model.layers, cache.layers, followings, strict=True):
            x, after = step_block(layer, x, own, cache.positions, model.config, following)
            kept.append(after)
        return x, tuple(kept)

    def apply(layer: Block, x: Stream, own: LayerCache) -> tuple[Stream, LayerCache]:
        y, kept = step_block(layer, x, own, cache.positions, model.config)
        return y.settled(), kept

    return _through_layers(model, x, cache.layers, apply)


def _through_layers(model: Llama, x: Any, caches: Any, apply: Apply) -> tuple[Any, Any]:
    """Applies every layer in turn: a scan where they are stacked, unrolled where they are a tuple.

    The scan carries caches that are there already and writes each over itself, so that there is never a second set.
    """
    if isinstance(model.layers, Stacked) and caches is None:
        return jax.lax.scan(lambda x, block: apply(block, x, None), x, model.layers.block)
    if isinstance(model.layers, Stacked):

        def step(carry: tuple[Any, Any], layer: tuple[Array, Block]) -> tuple[tuple[Any, Any], None]:
            (x, caches), (index, block) = carry, layer
            own = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), caches)
            # without the barrier XLA fuses the read into the write, and so copies all caches at every layer
            x, own = apply(block, x, jax.lax.optimization_barrier(own))
            write = jax.lax.dynamic_update_index_in_dim
            return (x, jax.tree.map(lambda leaf, new: write(leaf, new, index, 0), caches, own)), None

        return jax.lax.scan(step, (x, caches), (jnp.arange(model.layers.depth), model.layers.block))[0]
    outputs = []
    assert not isinstance(model.layers, Sharded), "each device goes through its own layers: `on_mesh`"
    for index, layer in enumerate(model.layers):
        x, output = apply(layer, x, None if caches is None else caches[index])
        outputs.append(output)
    return x, tuple(outputs)
