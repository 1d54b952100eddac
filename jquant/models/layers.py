"""The parts of a decoder block: linear, RMS norm, rotary positions, masked attention; arrays out."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jquant.formats import JoinedPart, PreparedRotation, ShardedTensor, UndividedActivation
from jquant.matmul import matmul
from jquant.models.config import RopeConfig
from jquant.models.tree import Linear
from jquant.types import DType, compute_dtype

QUERY_CHUNK: Final = 128  # 2-core CPU, 2048 tokens, 9 heads of 64: 0.04 s, 0.07 s by 256, 0.17 s with the scores whole


type Input = Float[Array, "*batch in"] | UndividedActivation


def linear(
    layer: Linear, x: Input, valid: Bool[Array, "*batch"] | None = None
) -> tuple[Float[Array, "*batch out"], Float[Array, "*batch tap"]]:
    """Returns (x @ kernel + bias, tap), the tap being the rotated x that the kernel multiplies, not yet quantized.

    Args:
      layer: the linear.
      x: its input.
      valid: which tokens are real, for input quantizers whose statistics cross tokens; None if all are.
    """
    if isinstance(x, UndividedActivation):
        if layer.input_rotation is None and layer.input_quantizer is None:
            return _add_bias(matmul(x, layer.kernel), layer), x.dequantize(x.dtype)
        x = x.dequantize(x.dtype)
    if isinstance(layer.kernel, ShardedTensor):
        x = layer.kernel.gather_inputs(x)
    if isinstance(layer.input_rotation, PreparedRotation) and x.size:
        method: Any = layer.input_quantizer
        method = method.method  # of a token's own grid, or nothing would have been prepared
        integers = layer.input_rotation.quantize(x, method.bits, method.clip_ratio, method.symmetry)
        return _add_bias(matmul(integers, layer.kernel), layer), layer.input_rotation(x)
    if layer.input_rotation is not None:
        x = layer.input_rotation(x)
    operand = x if layer.input_quantizer is None else layer.input_quantizer(x, valid)
    return _add_bias(matmul(operand, layer.kernel), layer), x


def is_plain(layer: Linear) -> bool:
    """Tells whether a linear only multiplies.

    >>> is_plain(Linear(jnp.ones((2, 3)))), is_plain(Linear(jnp.ones((2, 3)), jnp.ones(3)))
    (True, False)
    """
    return layer.bias is None and layer.input_rotation is None and layer.input_quantizer is None


def linears(
    layers: Sequence[Linear], x: Input, valid: Bool[Array, "*batch"] | None = None
) -> tuple[tuple[Float[Array, "*batch out"], ...], Float[Array, "*batch in"]]:
    """Returns what several linears make of one input, and the first one's tap, as `linear`; joined ones at once."""
    first, *others = layers
    if not all(isinstance(layer.kernel, JoinedPart) for layer in others):
        results = [linear(layer, x, valid) for layer in layers]
        return tuple(y for y, _ in results), results[0][1]
    y, tap = linear(dataclasses.replace(first, bias=None), x, valid)
    sizes = [layer.kernel.shape[1] for layer in others]
    ends = [y.shape[-1] - sum(sizes[index:]) for index in range(len(sizes))]
    matrix = y.reshape(math.prod(y.shape[:-1]), y.shape[-1])  # whose parts XLA knows for it where they are put together
    parts = [part.reshape(*y.shape[:-1], part.shape[1]) for part in jnp.split(matrix, ends, axis=1)]
    return tuple(_add_bias(part, layer) for part, layer in zip(parts, layers, strict=True)), tap


def _add_bias(y: Float[Array, "*batch out"], layer: Linear) -> Float[Array, "*batch out"]:
    return y if layer.bias is None else y + jnp.broadcast_to(layer.bias.astype(y.dtype), y.shape)


def rms_norm(
    x: Float[Array, "*batch dim"], scale: Float[Array, "dim"], eps: float, dtype: DType | None = None
) -> Float[Array, "*batch dim"]:
    """Returns scale * x / sqrt(mean(x^2) + eps), the mean in float32 or wider.

    Args:
      x: what is normed.
      scale: of each feature.
      eps: added to the mean of squares.
      dtype: of the result, rounded once from `x`'s; that of `x` if left out.
    """
    wide = x.astype(compute_dtype(x.dtype))
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    scaled = normed.astype(x.dtype) * jnp.broadcast_to(scale.astype(x.dtype), x.shape)
    return scaled if dtype is None else scaled.astype(dtype)


def rope_frequencies(rope: RopeConfig, dim: int) -> Float[Array, "half"]:
    """Returns the angle per position of each of the dim / 2 pairs, in float32.

    The series is theta^(-2i / dim). "linear" divides it by the factor; "llama3" divides wavelengths above
    original / low_freq_factor, keeps those below original / high_freq_factor, and blends linearly between.

    Reference: RoFormer (arXiv:2104.09864) section 3.2; Llama 3.1's scaling as in Hugging Face's config.json.
    """
    series = rope.theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    if rope.scaling == "linear":
        return series / rope.factor
    if rope.scaling == "default":
        return series
    turns = rope.original_max_position_embeddings * series / (2.0 * math.pi)  # context length / wavelength
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = jnp.clip(share, 0.0, 1.0)
    return series * kept + series / rope.factor * (1.0 - kept)


def rope_angles(
    positions: Int[Array, "tokens"], rope: RopeConfig, dim: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> Float[Array, "tokens dim"]:
    """Returns the cosines, then the sines, by which `apply_rope` turns each position's pairs."""
    angles = positions[:, None].astype(dtype) * rope_frequencies(rope, dim).astype(dtype)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def apply_rope(
    x: Float[Array, "tokens heads dim"], positions: Int[Array, "tokens"], rope: RopeConfig
) -> Float[Array, "tokens heads dim"]:
    """Turns the pairs (x[i], x[i + dim / 2]) by position * frequency[i]; computed in float32 or wider."""
    wide = x.astype(compute_dtype(x.dtype))
    cos, sin = jnp.split(rope_angles(positions, rope, x.shape[-1], wide.dtype)[:, None], 2, axis=-1)
    low, high = jnp.split(wide, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def causal_mask(
    queries: Int[Array, "queries"], keys: Int[Array, "keys"], window: int | None
) -> Bool[Array, "queries keys"]:
    """Tells which key positions each query position sees: itself and what lies before it, inside the window."""
    distance = queries[:, None] - keys[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def attention(
    queries: Float[Array, "batch tokens heads dim"],
    keys: Float[Array, "batch seen kv_heads dim"],
    values: Float[Array, "batch seen kv_heads dim"],
    mask: Bool[Array, "batch tokens seen"],
) -> Float[Array, "batch tokens heads dim"]:
    """Returns softmax(q k^T / sqrt(dim)) v over what the mask lets through, in the dtype of the queries.

    Scores and softmax are float32 or wider. Query heads share KV heads in order: heads / kv_heads each. Long
    prompts go `QUERY_CHUNK` queries at a time, so that the scores are never held whole.
    """
    batch, tokens, heads, dim = queries.shape
    kv_heads = keys.shape[2]
    own = queries.dtype
    grouped = queries.reshape(batch, tokens, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    keys, values = (array.astype(own).transpose(0, 2, 1, 3) for array in (keys, values))  # [b, kv_heads, seen, dim]
    if tokens <= QUERY_CHUNK:
        context = _attend(grouped, keys, values, mask)
    else:
        padding = -tokens % QUERY_CHUNK
        padded = jnp.pad(grouped, ((0, 0), (0, 0), (0, 0), (0, padding), (0, 0)))
        chunks = padded.reshape(*grouped.shape[:3], -1, QUERY_CHUNK, dim).transpose(3, 0, 1, 2, 4, 5)
        masks = jnp.pad(mask, ((0, 0), (0, padding), (0, 0))).reshape(batch, -1, QUERY_CHUNK, mask.shape[-1])
        context = jax.lax.map(lambda one: _attend(one[0], keys, values, one[1]), (chunks, masks.swapaxes(0, 1)))
        context = context.transpose(1, 2, 3, 0, 4, 5).reshape(padded.shape)[:, :, :, :tokens]
    return context.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads, dim)


def _attend(
    queries: Float[Array, "batch kv_heads share tokens dim"],
    keys: Float[Array, "batch kv_heads seen dim"],
    values: Float[Array, "batch kv_heads seen dim"],
    mask: Bool[Array, "batch tokens seen"],
) -> Float[Array, "batch kv_heads share tokens dim"]:
    """Attends in one product for all query heads that share a KV head."""
    batch, kv_heads, share, tokens, dim = queries.shape
    own, wide = queries.dtype, compute_dtype(queries.dtype)
    rows = queries.reshape(batch, kv_heads, share * tokens, dim)
    scores = jnp.einsum("bhqd,bhkd->bhqk", rows, keys, preferred_element_type=wide) / math.sqrt(dim)
    scores = scores.reshape(batch, kv_heads, share, tokens, -1)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(wide).min)
    terms = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(terms, axis=-1, keepdims=True)
    terms = terms.astype(own).reshape(batch, kv_heads, share * tokens, -1)
    context = jnp.einsum("bhqk,bhkd->bhqd", terms, values, preferred_element_type=wide)
    return (context.reshape(batch, kv_heads, share, tokens, dim) / total).astype(own)
