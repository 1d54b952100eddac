"""What a checkpoint holds, read from its headers: each linear's format, bits and what happens to its input; caches."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import jax

from jquant.formats import QuantizedTensor, tree_nbytes
from jquant.kv import KvCodec
from jquant.machines import Target
from jquant.models import Linear, Llama, Stacked, blocks, linears
from jquant.sharding import choose_cuts
from jquant.targets import choose_attention, choose_product, choose_prompts

CACHE_LENGTH: Final = 4096  # tokens at which caches are measured; KIVI's exact window weighs little there
_FINGERPRINT: Final = "calibrated_for"  # 64 digits that say nothing to a reader


@dataclass(frozen=True)
class LinearFacts:
    """One linear as it is stored.

    Attributes:
      path: such as `layers.0.mlp.up_proj`.
      shape: (in, out).
      format: its node and the node's settings, or its dtype.
      bits_per_weight: 8 * bytes / (in * out).
      relative_error: |w - q| / |w|, Frobenius, from the report of its run; None where there is none.
      input: what happens to its input before the product, in words; empty for nothing.
      product: what multiplies it on the target that was asked for, in words; empty where none was.
      cut: what each device of the mesh that was asked for has of it, in words; empty where none was.
    """

    path: str
    shape: tuple[int, ...]
    format: str
    bits_per_weight: float
    relative_error: float | None = None
    input: str = ""
    product: str = ""
    cut: str = ""


@dataclass(frozen=True)
class CacheFacts:
    """The KV caches of a model, from the arrays of empty ones.

    Attributes:
      codec: its name and settings; several are joined by " + ".
      length: tokens of one sequence that the cache is made for.
      nbytes_per_token: bytes of all layers, divided by the length.
      bits_per_value: bits of all layers, divided by the numbers that keys and values are.
    """

    codec: str
    length: int
    nbytes_per_token: float
    bits_per_value: float


@dataclass(frozen=True)
class Facts:
    """A model as it is stored.

    Attributes:
      linears: the linears of all blocks, in order.
      structures: how many different structures the blocks have; each is compiled on its own.
      nbytes: bytes of all arrays.
      cache: what keys and values take.
      query_key_rotations: what turns each block's queries and keys after RoPE, in words; empty for nothing.
      attentions: what attends in each block's decode steps on the target that was asked for; none where none was.
      prompts: what attends to whole prompts of each block there; likewise.
    """

    linears: tuple[LinearFacts, ...]
    structures: int
    nbytes: int
    cache: CacheFacts
    query_key_rotations: tuple[str, ...]
    attentions: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()

    def bits_per_weight(self) -> float:
        """Returns the bits per weight of all linears of the blocks taken together."""
        weights = [math.prod(row.shape) for row in self.linears]
        bits = [row.bits_per_weight * size for row, size in zip(self.linears, weights, strict=True)]
        return sum(bits) / sum(weights)


def inspect_model(
    model: Llama,
    report: Mapping[str, Any] | None = None,
    *,
    target: Target | None = None,
    axes: tuple[int, int] | None = None,
) -> Facts:
    """Lists what a model holds.

    Args:
      model: the model, or an abstract one; its layers are a tuple.
      report: the report.json of the run that made it.
      target: where it shall run; None to leave out what would multiply it there.
      axes: devices along data and tensor over which it shall be spread; None to leave out what each would have.

    Returns:
      The facts.

    Example:
      >>> from jquant.models import abstract_llama, tiny_config
      >>> facts = inspect_model(abstract_llama(tiny_config(), "bfloat16"))
      >>> facts.linears[0].format, facts.bits_per_weight(), facts.structures
      ('bfloat16', 16.0, 1)
    """
    solved = (report or {}).get("blocks", ())
    errors = {row["path"]: row["relative_error"] for block in solved for row in block["linears"]}
    chosen = () if axes is None else choose_cuts(model, *axes)
    cuts = {path: cut.describe() for path, cut in chosen}
    rows = tuple(
        LinearFacts(
            path=path,
            shape=tuple(layer.kernel.shape),
            format=describe_format(layer.kernel),
            bits_per_weight=8.0 * tree_nbytes(layer.kernel) / math.prod(layer.kernel.shape),
            relative_error=errors.get(path),
            input=describe_input(layer),
            product="" if target is None else choose_product(layer, target).describe(),
            cut=cuts.get(path, ""),
        )
        for path, layer in linears(model)
    )
    rotations = tuple(
        "" if rotation is None else rotation.describe()
        for rotation in (block.self_attn.query_key_rotation for block in blocks(model))
    )
    codecs = [] if target is None else [block.self_attn.kv_codec for block in blocks(model)]
    attentions, prompts = (
        tuple(choose(model, codec, target).describe() for codec in codecs if target is not None)
        for choose in (choose_attention, choose_prompts)
    )
    cache = measure_cache(model)
    return Facts(rows, count_structures(model), tree_nbytes(model), cache, rotations, attentions, prompts)


def measure_cache(model: Llama) -> CacheFacts:
    """Measures the caches that a model would make for one sequence, without making them.

    Args:
      model: the model, or an abstract one; its layers are a tuple.

    Returns:
      The facts at 4096 tokens, or at the model's context if that is shorter.

    Example:
      >>> from jquant.models import abstract_llama, tiny_config
      >>> facts = measure_cache(abstract_llama(tiny_config(), "bfloat16"))
      >>> facts.codec, facts.length, facts.bits_per_value
      ('ExactKv(prompt=exact)', 256, 16.0)
    """
    config, dtype = model.config, model.embed_tokens.dtype
    heads, dim = config.num_key_value_heads, config.head_dim
    length = min(CACHE_LENGTH, config.max_position_embeddings)
    codecs = [block.self_attn.kv_codec for block in blocks(model)]
    caches = [jax.eval_shape(lambda codec=codec: codec.init(length, heads, dim, dtype)) for codec in codecs]
    values = 2 * length * heads * dim * len(caches)
    return CacheFacts(
        codec=" + ".join(dict.fromkeys(describe_codec(codec) for codec in codecs)),
        length=length,
        nbytes_per_token=tree_nbytes(caches) / length,
        bits_per_value=8.0 * tree_nbytes(caches) / values,
    )


def describe_codec(codec: KvCodec) -> str:
    """Returns a codec's node with its static settings in words, but for the fingerprint of its calibration."""
    static = [field.name for field in dataclasses.fields(codec) if not field.metadata.get("pytree_node", True)]  # type: ignore[arg-type]
    shown = [name for name in static if name != _FINGERPRINT]
    return f"{type(codec).__name__}({', '.join(f'{name}={getattr(codec, name)}' for name in shown)})"


def count_structures(model: Llama) -> int:
    """Returns how many different structures the blocks have: nodes, static settings, shapes and dtypes."""
    if isinstance(model.layers, Stacked):
        return 1
    return len(
        {
            (jax.tree.structure(block), tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(block)))
            for block in blocks(model)
        }
    )


def describe_input(layer: Linear) -> str:
    """Returns what a linear does to its input, in words and in order; empty for nothing.

    Example:
      >>> from jquant.activations import PerToken
      >>> describe_input(Linear(None, input_quantizer=PerToken(bits=4).fit(None)))
      'PerToken(bits=4, symmetry=symmetric, clip_ratio=1.0, group_size=None)'
    """
    steps = [] if layer.input_rotation is None else [layer.input_rotation.describe()]
    if layer.input_quantizer is not None:
        method = layer.input_quantizer.method
        settings = [f"{one.name}={getattr(method, one.name)}" for one in dataclasses.fields(method)]  # type: ignore[arg-type]
        steps.append(f"{type(method).__name__}({', '.join(settings)})")
    return ", ".join(steps)


def describe_format(kernel: Any) -> str:
    """Returns a kernel's node with its static settings in words, or its dtype if it is an array."""
    if not isinstance(kernel, QuantizedTensor):
        return str(kernel.dtype)
    parts = []
    for field in dataclasses.fields(kernel):  # type: ignore[arg-type]
        value = getattr(kernel, field.name)
        if isinstance(value, QuantizedTensor):
            parts.append(describe_format(value))
        elif dataclasses.is_dataclass(value):
            parts += [f"{one.name}={getattr(value, one.name)}" for one in dataclasses.fields(value)]
    return f"{type(kernel).__name__.removesuffix('Tensor')}({', '.join(parts)})"
