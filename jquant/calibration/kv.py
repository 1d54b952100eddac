"""Calibration of KV caches: the largest key and value of each layer over some text, and the codecs made from them.

A calibrated codec keeps the fingerprint of the model that it was calibrated on, and is refused in any other.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jquant.calibration.sequential import dense_kernels
from jquant.calibration.walk import NOTHING_KEPT, Keeping, all_finite, larger, observe_all, open_inputs, refuse_infinite
from jquant.checkpoint import digest_lazily, open_lazily
from jquant.errors import CheckpointError
from jquant.kv import ExactKv, Float8Kv, KvCodec, KvQuant, Prompt, RazorKv, fit_float8_scale, fit_scale
from jquant.models import (
    Block,
    LazyModel,
    Llama,
    LlamaConfig,
    blocks,
    lazily,
    prompt_block,
    put,
    rewrite,
    set_kv_codec,
)
from jquant.types import Leaf

_CALIBRATED: Final = (RazorKv, KvQuant, Float8Kv)  # the codecs that have a `calibrated_for`


class KvRange(NamedTuple):
    """Hold max |key| after RoPE and max |value| of one layer, float32 []."""

    keys: Leaf
    values: Leaf


def kv_ranges(
    model: Llama | LazyModel, tokens: Int[Array, "samples length"], keeping: Keeping = NOTHING_KEPT
) -> tuple[KvRange, ...]:
    """Returns the ranges of every layer's keys and values over calibration text.

    Nothing is quantized on the way but what the model itself quantizes; its own KV codecs are left out. One block and
    its activations are held at a time.

    Args:
      model: the model, its layers a tuple.
      tokens: calibration windows.
      keeping: where activations are kept, and over which devices windows are spread.

    Raises:
      CalibrationError: a block gives something that is not finite; it is named.

    Example:
      >>> from jquant.models import random_model, tiny_config
      >>> model = random_model(tiny_config(), jax.random.key(0))
      >>> len(kv_ranges(model, jnp.zeros((2, 8), jnp.int32)))
      2
    """
    model, ranges = lazily(model), []
    config = model.abstract.config

    def observe(layer: Block, windows: Array, before: Any) -> tuple[Array, Any]:
        outputs, found = _observe(layer, windows, config)
        seen = found, all_finite(outputs)
        return outputs, seen if before is None else larger(before, seen)

    with open_inputs(model, tokens, keeping) as inputs:
        for index in range(len(blocks(model.abstract))):
            exact: Block = put(model.read(f"layers.{index}"), "self_attn.kv_codec", ExactKv())
            inputs, (found, finite) = observe_all(dense_kernels(exact), inputs, observe, larger)
            refuse_infinite(index, finite)
            ranges.append(found)
    return tuple(ranges)


def calibrate_razor_kv(
    model: Llama | LazyModel,
    tokens: Int[Array, "samples length"],
    keeping: Keeping = NOTHING_KEPT,
    *,
    base_bits: int = 8,
    bits: int = 4,
    group_size: int = 8,
    prompt: Prompt = "stored",
) -> tuple[RazorKv, ...]:
    """Returns QRazor's cache for each layer, on static scales: one for the layer's keys, one for its values.

    Args:
      model: the model, its layers a tuple.
      tokens: calibration windows.
      keeping: as of `kv_ranges`.
      base_bits: see `RazorKv`, as the others.
      bits: bits that are kept.
      group_size: neighbours that drop the same bits.
      prompt: what a prompt's own queries see.

    Raises:
      CalibrationError: as `kv_ranges`.
    """
    own = fingerprint(model)
    return tuple(
        RazorKv(
            key_scale=fit_scale(found.keys, base_bits),
            value_scale=fit_scale(found.values, base_bits),
            base_bits=base_bits,
            bits=bits,
            group_size=group_size,
            prompt=prompt,
            calibrated_for=own,
        )
        for found in kv_ranges(model, tokens, keeping)
    )


def calibrate_float8_kv(
    model: Llama | LazyModel,
    tokens: Int[Array, "samples length"],
    keeping: Keeping = NOTHING_KEPT,
    *,
    prompt: Prompt = "stored",
) -> tuple[Float8Kv, ...]:
    """Returns a cache of float8 for each layer, on static scales: one for the layer's keys, one for its values.

    Args:
      model: the model, its layers a tuple.
      tokens: calibration windows.
      keeping: as of `kv_ranges`.
      prompt: what a prompt's own queries see.

    Raises:
      CalibrationError: as `kv_ranges`.
    """
    own = fingerprint(model)
    return tuple(
        Float8Kv(fit_float8_scale(found.keys), fit_float8_scale(found.values), prompt, own)
        for found in kv_ranges(model, tokens, keeping)
    )


def put_codecs(model: Llama, codecs: Sequence[KvCodec]) -> Llama:
    """Returns the model with one codec for each layer."""
    pairs = zip(blocks(model), codecs, strict=True)
    return dataclasses.replace(model, layers=tuple(put(block, "self_attn.kv_codec", codec) for block, codec in pairs))


def fingerprint(model: Llama | LazyModel) -> str:
    """Returns the sha256 of a model's configuration, structure and every byte of its arrays, KV codecs left out.

    So a fine-tune differs from its base, a quantized model from what it was, float32 from bfloat16.
    """
    return digest_lazily(rewrite(lazily(model), lambda whole: set_kv_codec(whole, ExactKv())))


def load_kv_codecs(model: Llama | LazyModel, path: Path | str) -> tuple[KvCodec, ...]:
    """Returns the KV codecs of a checkpoint, one for each layer of a model that they fit.

    Args:
      model: the model, its layers a tuple.
      path: a checkpoint whose codecs are not calibrated, or were calibrated on this very model.

    Raises:
      CheckpointError: the checkpoint cannot be read, has another number of layers, or a codec of it was calibrated on
        another model than this one is now.
    """
    model, kept = lazily(model), open_lazily(path)
    depth = len(blocks(model.abstract))
    codecs = tuple(kept.read(f"layers.{index}.self_attn.kv_codec") for index in range(len(blocks(kept.abstract))))
    if len(codecs) != depth:
        raise CheckpointError(f"{path} has KV codecs for {len(codecs)} layers, the model has {depth}")
    origins = {codec.calibrated_for for codec in codecs if isinstance(codec, _CALIBRATED)}
    own = fingerprint(model) if origins else ""
    if origins - {own}:
        known = ", ".join(origin[:12] or "unknown" for origin in sorted(origins))
        raise CheckpointError(
            f"the KV codecs of {path} were calibrated on another model ({known}) "
            f"than this one ({own[:12]}): its weights, dtype or settings differ. Calibrate on this model; if it is "
            "quantized later, load the codecs where the recipe stands when they were calibrated"
        )
    return codecs


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
