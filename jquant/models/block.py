"""One decoder block, its attention left open: what queries attend to, and what is kept of it, is the caller's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jquant.formats import Layout, UndividedActivation
from jquant.fused import gated_fault, matmul_gated
from jquant.kv import LayerCache, Rope
from jquant.models.config import LlamaConfig
from jquant.models.layers import Input, apply_rope, attention, causal_mask, is_plain, linears, rms_norm
from jquant.models.stream import Stream, add_linear, add_norm
from jquant.models.tree import Attention, Block, Mlp
from jquant.types import Leaf

type Valid = Bool[Array, "batch tokens"] | None  # which tokens are no padding; None: all
type KeysValues = tuple[jax.Array, jax.Array]
type Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, LayerCache]]


class Taps(NamedTuple):
    """What each linear's kernel multiplies, [batch, tokens, features]; free under jit where unused."""

    attention_input: Float[Array, "batch tokens hidden"]
    attention_output: Float[Array, "batch tokens queries"]
    mlp_input: Float[Array, "batch tokens hidden"]
    mlp_hidden: Float[Array, "batch tokens inner"]


def make_rope(layer: Attention, config: LlamaConfig) -> Rope:
    """Returns what turns queries and keys by their positions, and then by the layer's rotation if it has one."""

    def rope(
        heads: Float[Array, "tokens heads dim"], positions: Int[Array, "tokens"]
    ) -> Float[Array, "tokens heads dim"]:
        turned = apply_rope(heads, positions, config.rope)
        return turned if layer.query_key_rotation is None else layer.query_key_rotation(turned)

    return rope


def run_block(
    layer: Block, x: Float[Array, "batch tokens hidden"], valid: Valid, attend: Attend, config: LlamaConfig
) -> tuple[Float[Array, "batch tokens hidden"], LayerCache, Taps]:
    """Runs a block as `stream_block`, and adds its last update."""
    y, cache, taps = stream_block(layer, Stream(x), valid, attend, config, Layout.PORTABLE)
    return y.settled().value, cache, taps


def stream_block(
    layer: Block,
    x: Stream,
    valid: Valid,
    attend: Attend,
    config: LlamaConfig,
    layout: Layout,
    following: Leaf | None = None,
) -> tuple[Stream, LayerCache, Taps]:
    """Runs a block, its attention by `attend`.

    Args:
      layer: the block.
      x: its input.
      valid: which tokens are no padding; None if all are.
      attend: takes queries, keys and values before RoPE; returns what the queries gather, and a cache or what else
        shall be kept.
      config: the model's sizes.
      layout: whose kernel makes the norms.
      following: the scale of the norm behind the block, which its last kernel may begin; None where none is known.

    Returns:
      The block's output, its last update perhaps not yet added, what `attend` keeps, and the taps.
    """
    attention, mlp = layer.self_attn, layer.mlp
    between: Leaf | None = layer.post_attention_layernorm
    if layout is Layout.PORTABLE:  # norms are XLA's
        between = following = None
    value, normed = add_norm(x, layer.input_layernorm, config, layout)
    context, cache, attention_input = _attend(attention, normed, valid, attend, config)
    x, attention_output = add_linear(value, attention.o_proj, context, valid, between, config)
    value, normed = add_norm(x, layer.post_attention_layernorm, config, layout)
    hidden, mlp_input = _hidden(mlp, normed, valid)
    x, mlp_hidden = add_linear(value, mlp.down_proj, hidden, valid, following, config)
    return x, cache, Taps(attention_input, attention_output, mlp_input, mlp_hidden)


def exact_block(
    layer: Block,
    x: Float[Array, "batch tokens hidden"],
    shifts: tuple[Float[Array, "tokens heads dim"], Float[Array, "tokens heads dim"]],
    config: LlamaConfig,
) -> tuple[Float[Array, "batch tokens hidden"], KeysValues]:
    """Runs one block over whole sequences, its cache left out, with something added to keys and values.

    The gradient with regard to shifts of zero is that with regard to what a codec would be given.

    Args:
      layer: the block.
      x: its input.
      shifts: what is added to each sequence's keys before RoPE and to its values.
      config: the model's sizes.

    Returns:
      The block's output, and the keys before RoPE and the values, shifted, [batch, tokens, heads, dim].
    """
    rope = make_rope(layer.self_attn, config)
    positions = jnp.arange(x.shape[1])
    mask = jnp.broadcast_to(causal_mask(positions, positions, config.sliding_window), (x.shape[0], *2 * (x.shape[1],)))

    def attend(
        queries: Float[Array, "batch tokens heads dim"],
        keys: Float[Array, "batch tokens kv_heads dim"],
        values: Float[Array, "batch tokens kv_heads dim"],
    ) -> tuple[Float[Array, "batch tokens heads dim"], KeysValues]:
        keys, values = (one + shift[None] for one, shift in zip((keys, values), shifts, strict=True))
        rotate = jax.vmap(lambda heads: rope(heads, positions))
        return attention(rotate(queries), rotate(keys), values, mask), (keys, values)

    y, seen, _ = run_block(layer, x, None, attend, config)
    return y, seen


def _attend(
    layer: Attention, x: Input, valid: Valid, attend: Attend, config: LlamaConfig
) -> tuple[Float[Array, "batch tokens queries"], LayerCache, Float[Array, "batch tokens hidden"]]:
    """Returns what the queries gather, what `attend` keeps, and the tap of the three linears."""
    projected, tap = linears((layer.q_proj, layer.k_proj, layer.v_proj), x, valid)
    queries, keys, values = (y.reshape(*y.shape[:2], -1, config.head_dim) for y in projected)
    if layer.q_norm is not None and layer.k_norm is not None:
        queries = rms_norm(queries, layer.q_norm, config.rms_norm_eps)
        keys = rms_norm(keys, layer.k_norm, config.rms_norm_eps)
    context, cache = attend(queries, keys, values)
    return context.reshape(*context.shape[:2], -1), cache, tap


def _hidden(
    layer: Mlp, x: Input, valid: Valid
) -> tuple[Float[Array, "batch tokens inner"], Float[Array, "batch tokens hidden"]]:
    """Returns silu(gate(x)) * up(x), and the tap of both linears."""
    kernel: Any = layer.gate_proj.kernel
    plain = is_plain(layer.gate_proj) and is_plain(layer.up_proj)
    if plain and gated_fault(x, kernel, layer.up_proj.kernel) is None:
        return matmul_gated(x, kernel), x.dequantize(x.dtype) if isinstance(x, UndividedActivation) else x
    (gate, up), tap = linears((layer.gate_proj, layer.up_proj), x, valid)
    return jax.nn.silu(gate) * up, tap
