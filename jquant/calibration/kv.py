"""Calibration of KV caches: the largest key and value of each layer over some text, and the codecs made from them."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jquant.calibration.sequential import dense_kernels
from jquant.kv import ExactKv, KvCodec, Prompt, RazorKv, fit_scale
from jquant.models import Block, Llama, LlamaConfig, blocks, embed, prompt_block, put
from jquant.types import Leaf


class KvRange(NamedTuple):
    """Hold max |key| after RoPE and max |value| of one layer, float32 []."""

    keys: Leaf
    values: Leaf


def kv_ranges(model: Llama, tokens: Int[Array, "samples length"]) -> tuple[KvRange, ...]:
    """Returns the ranges of every layer's keys and values over calibration text.

    Nothing is quantized on the way but what the model itself quantizes; its own KV codecs are left out.

    Args:
      model: the model, its layers a tuple.
      tokens: calibration windows.

    Example:
      >>> from jquant.models import random_model, tiny_config
      >>> model = random_model(tiny_config(), jax.random.key(0))
      >>> len(kv_ranges(model, jnp.zeros((2, 8), jnp.int32)))
      2
    """
    x, ranges = embed(model, tokens), []
    for layer in blocks(model):
        exact: Block = put(layer, "self_attn.kv_codec", ExactKv())
        x, found = _observe(dense_kernels(exact), x, model.config)
        ranges.append(found)
    return tuple(ranges)


def calibrate_razor_kv(
    model: Llama,
    tokens: Int[Array, "samples length"],
    *,
    base_bits: int = 8,
    bits: int = 4,
    group_size: int = 8,
    prompt: Prompt = "stored",
) -> Llama:
    """Returns the model with QRazor's cache on static scales: of each layer, one for its keys, one for its values.

    Args:
      model: the model, its layers a tuple.
      tokens: calibration windows.
      base_bits: see `RazorKv`, as the others.
      bits: bits that are kept.
      group_size: neighbours that drop the same bits.
      prompt: what a prompt's own queries see.
    """
    codecs = [
        RazorKv(
            key_scale=fit_scale(found.keys, base_bits),
            value_scale=fit_scale(found.values, base_bits),
            base_bits=base_bits,
            bits=bits,
            group_size=group_size,
            prompt=prompt,
        )
        for found in kv_ranges(model, tokens)
    ]
    return put_codecs(model, codecs)


def put_codecs(model: Llama, codecs: Sequence[KvCodec]) -> Llama:
    """Returns the model with one codec for each layer."""
    pairs = zip(blocks(model), codecs, strict=True)
    return dataclasses.replace(model, layers=tuple(put(block, "self_attn.kv_codec", codec) for block, codec in pairs))


@functools.partial(jax.jit, static_argnums=2)
def _observe(
    layer: Block, inputs: Float[Array, "samples tokens hidden"], config: LlamaConfig
) -> tuple[Float[Array, "samples tokens hidden"], KvRange]:
    """Runs a block over all samples, one at a time; returns its outputs and the ranges of its exact cache."""
    tokens = inputs.shape[1]

    def run(x: Float[Array, "tokens hidden"]) -> tuple[Float[Array, "tokens hidden"], KvRange]:
        y, cache, _ = prompt_block(layer, x[None], jnp.full(1, tokens, jnp.int32), tokens, config)
        return y[0], KvRange(*(jnp.max(jnp.abs(array)).astype(jnp.float32) for array in (cache.keys, cache.values)))

    outputs, ranges = jax.lax.map(run, inputs)
    return outputs, KvRange(*(jnp.max(array) for array in ranges))
