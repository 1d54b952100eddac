"""The model as a tree of `flax.struct` nodes. The tree is the model: a transform rewrites it, nothing is patched.

Field names equal Hugging Face's, so a path such as `layers.3.self_attn.q_proj` means the same in both.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from jquant.activations import ActivationQuantizer
from jquant.errors import FormatError
from jquant.formats import OnlineRotation, PreparedRotation, align_outliers
from jquant.kv import ExactKv, KvCodec
from jquant.models.config import LlamaConfig
from jquant.types import Leaf

type Make = Callable[[str, tuple[int, ...]], Any]  # (path, shape) -> the array to stand there


@struct.dataclass
class Linear:
    """y = x @ kernel + bias, x having gone through `input_rotation` and `input_quantizer` where there are such.

    Attributes:
      kernel: [in, out], an array or a `QuantizedTensor`.
      bias: [out] or absent.
      input_rotation: an orthogonal operator on the input, whose inverse the kernel has absorbed.
      input_quantizer: what rounds the rotated input before the product.
    """

    kernel: Leaf
    bias: Leaf | None = None
    input_rotation: OnlineRotation | PreparedRotation | None = None
    input_quantizer: ActivationQuantizer | None = None


@struct.dataclass
class Attention:
    """Grouped-query attention; `q_norm` and `k_norm`, [head_dim], are present where the family has them.

    `query_key_rotation` acts on each head of queries and keys after RoPE: scores stay, what a KV cache keeps is spread.
    """

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: Leaf | None = None
    k_norm: Leaf | None = None
    kv_codec: KvCodec = ExactKv()
    query_key_rotation: OnlineRotation | None = None


@struct.dataclass
class Mlp:
    """down(silu(gate(x)) * up(x))."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear


@struct.dataclass
class Block:
    """One decoder layer; the two norms are scales [hidden]."""

    input_layernorm: Leaf
    self_attn: Attention
    post_attention_layernorm: Leaf
    mlp: Mlp


@struct.dataclass
class Stacked:
    """`depth` blocks of equal structure as one block whose leaves have a leading axis; made by `stack_layers`."""

    block: Block
    depth: int = struct.field(pytree_node=False)


@struct.dataclass
class Sharded:
    """Layers that the devices of a mesh hold together; made by `jquant.sharding.shard`, never on disk.

    Attributes:
      layers: blocks of one device's heads and features, a tuple or `Stacked`; each leaf has a leading axis of devices,
        spread over the mesh's axis `tensor`.
      mesh: the devices; its axis `data` has the rows of a batch.
      config: the sizes that one device sees.
      vocabulary: whether each device has rows of the embedding and columns of the head of its own.
      notes: what every device has whole, and why.
    """

    layers: "tuple[Block, ...] | Stacked"
    mesh: Mesh = struct.field(pytree_node=False)
    config: LlamaConfig = struct.field(pytree_node=False)
    vocabulary: bool = struct.field(pytree_node=False)
    notes: tuple[str, ...] = struct.field(pytree_node=False, default=())


@struct.dataclass
class Llama:
    """A decoder of the Llama family.

    Attributes:
      embed_tokens: [vocab, hidden].
      layers: a tuple of blocks (canonical), `Stacked` for serving, or `Sharded` over several devices.
      norm: scale of the final norm, [hidden].
      lm_head: the output projection; None where it is tied to `embed_tokens`.
      config: sizes and switches, static.
    """

    embed_tokens: Leaf
    layers: tuple[Block, ...] | Stacked | Sharded
    norm: Leaf
    lm_head: Linear | None
    config: LlamaConfig = struct.field(pytree_node=False)


def build(config: LlamaConfig, make: Make) -> Llama:
    """Builds a model by asking `make(path, shape)` for each array; the one place that lists a model's arrays.

    Args:
      config: sizes and switches.
      make: returns the array (or an abstract stand-in) for a path such as `layers.0.mlp.up_proj.kernel`.

    Returns:
      The model, its layers as a tuple and its caches exact.

    Example:
      >>> tiny = LlamaConfig(8, 4, 8, 1, 2, 1, 2, tie_word_embeddings=True)
      >>> build(tiny, lambda path, shape: jnp.zeros(shape)).layers[0].mlp.up_proj.kernel.shape
      (4, 8)
    """
    hidden = config.hidden_size
    untied = not config.tie_word_embeddings
    return Llama(
        embed_tokens=make("embed_tokens", (config.vocab_size, hidden)),
        layers=tuple(_build_block(config, make, f"layers.{index}") for index in range(config.num_hidden_layers)),
        norm=make("norm", (hidden,)),
        lm_head=_build_linear(make, "lm_head", hidden, config.vocab_size, bias=False) if untied else None,
        config=config,
    )


def abstract_llama(config: LlamaConfig, dtype: jax.typing.DTypeLike = jnp.float32) -> Llama:
    """Returns the model with `jax.ShapeDtypeStruct` in place of arrays."""
    return build(config, lambda path, shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))


def stack_layers(model: Llama) -> Llama:
    """Turns equal layers into one `Stacked` block, which the runtime scans: it compiles once, whatever the depth.

    SpQR's lists of outliers get the length of the longest.

    Raises:
      FormatError: the layers differ in structure, shapes or dtypes; the first difference is named.
    """
    if isinstance(model.layers, Stacked):
        return model
    if isinstance(model.layers, Sharded):
        raise FormatError("the layers are spread over the devices of a mesh: stack each device's own, in `shard`")
    first, *others = layers = align_outliers(model.layers)
    for index, layer in enumerate(others, start=1):
        difference = _first_difference(first, layer)
        if difference:
            raise FormatError(f"layers 0 and {index} cannot be stacked: {difference}")
    block = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return dataclasses.replace(model, layers=Stacked(block=block, depth=len(model.layers)))


def _first_difference(first: Block, other: Block) -> str | None:
    left, right = (jax.tree_util.tree_flatten_with_path(block) for block in (first, other))
    names = [[jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in side[0]] for side in (left, right)]
    if names[0] != names[1]:
        only = sorted(set(names[0]) ^ set(names[1]))
        return f"only one of them has {', '.join(only[:3])}"
    for (_, a), (_, b), name in zip(left[0], right[0], names[0], strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{name} is {a.dtype}{list(a.shape)} in one, {b.dtype}{list(b.shape)} in the other"
    structures = [str(side[1]) for side in (left, right)]
    return None if structures[0] == structures[1] else f"their static settings differ: {' against '.join(structures)}"


def _build_block(config: LlamaConfig, make: Make, path: str) -> Block:
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    attention, mlp = f"{path}.self_attn", f"{path}.mlp"
    return Block(
        input_layernorm=make(f"{path}.input_layernorm", (hidden,)),
        self_attn=Attention(
            q_proj=_build_linear(make, f"{attention}.q_proj", hidden, queries, bias=config.attention_bias),
            k_proj=_build_linear(make, f"{attention}.k_proj", hidden, keys, bias=config.attention_bias),
            v_proj=_build_linear(make, f"{attention}.v_proj", hidden, keys, bias=config.attention_bias),
            o_proj=_build_linear(make, f"{attention}.o_proj", queries, hidden, bias=config.output_bias),
            q_norm=make(f"{attention}.q_norm", (dim,)) if config.qk_norm else None,
            k_norm=make(f"{attention}.k_norm", (dim,)) if config.qk_norm else None,
        ),
        post_attention_layernorm=make(f"{path}.post_attention_layernorm", (hidden,)),
        mlp=Mlp(
            gate_proj=_build_linear(make, f"{mlp}.gate_proj", hidden, inner, bias=config.mlp_bias),
            up_proj=_build_linear(make, f"{mlp}.up_proj", hidden, inner, bias=config.mlp_bias),
            down_proj=_build_linear(make, f"{mlp}.down_proj", inner, hidden, bias=config.mlp_bias),
        ),
    )


def _build_linear(make: Make, path: str, inputs: int, outputs: int, *, bias: bool) -> Linear:
    return Linear(make(f"{path}.kernel", (inputs, outputs)), make(f"{path}.bias", (outputs,)) if bias else None)
