"""Largest magnitudes of what the linears multiply: one streaming pass over the model, block by block."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jquant.blocks import SITES
from jquant.calibration.walk import NOTHING_KEPT, Keeping, larger, observe_all, open_inputs, refuse_infinite
from jquant.models import Block, LazyModel, Llama, LlamaConfig, blocks, get, lazily, prompt_block
from jquant.quantizers import ABSMAX
from jquant.types import compute_dtype


def collect_absmax(
    model: Llama | LazyModel, tokens: Int[Array, "samples length"], keeping: Keeping = NOTHING_KEPT
) -> tuple[Mapping[str, Float[Array, "_"]], ...]:
    """Returns the largest magnitude over all tokens of each channel of each site's input.

    One block and its activations are held at a time, and one program serves all blocks of equal structure.

    Args:
      model: the model as it shall be measured, its layers a tuple.
      tokens: calibration windows.
      keeping: where activations are kept, and over which devices windows are spread.

    Returns:
      For each block, by the names of `SITES`: [features], in float32 (float64 for a float64 model).

    Raises:
      CalibrationError: a block gives something that is not finite; it is named.
      FormatError: the layers are stacked.

    Example:
      >>> from jquant.models import random_model, tiny_config
      >>> model = random_model(tiny_config(), jax.random.key(0))
      >>> absmax = collect_absmax(model, jnp.zeros((1, 4), int))
      >>> len(absmax), absmax[0]["mlp_input"].shape, absmax[0]["mlp_hidden"].shape
      (2, (64,), (96,))
    """
    model, found = lazily(model), []
    config = model.abstract.config

    def observe(layer: Block, windows: Array, before: Any) -> tuple[Array, Any]:
        outputs, largest, finite = measure_absmax(layer, windows, config)
        return outputs, (largest, finite) if before is None else larger(before, (largest, finite))

    with open_inputs(model, tokens, keeping) as inputs:
        for index in range(len(blocks(model.abstract))):
            inputs, (largest, finite) = observe_all(model.read(f"layers.{index}"), inputs, observe, larger)
            refuse_infinite(index, finite)
            found.append(largest)
    return tuple(found)


@functools.partial(jax.jit, static_argnums=2)
def measure_absmax(
    layer: Block, inputs: Float[Array, "samples tokens hidden"], config: LlamaConfig
) -> tuple[Float[Array, "samples tokens hidden"], dict[str, Float[Array, "_"]], Bool[Array, ""]]:
    """Returns a block's outputs, the largest magnitudes of its sites' inputs, and whether all outputs are finite.

    The flag is not redundant: XLA's maximum on CPU loses NaNs.
    """
    lengths, wide = jnp.full(1, inputs.shape[1], jnp.int32), compute_dtype(inputs.dtype)

    def step(
        largest: dict[str, jax.Array], sample: Float[Array, "tokens hidden"]
    ) -> tuple[dict[str, jax.Array], Float[Array, "tokens hidden"]]:
        output, _, taps = prompt_block(layer, sample[None], lengths, sample.shape[0], config)
        return {site: ABSMAX.update(largest[site], getattr(taps, site)[0]) for site in SITES}, output[0]

    none = {site: jnp.zeros(get(layer, names[0]).kernel.shape[0], wide) for site, names in SITES.items()}
    largest, outputs = jax.lax.scan(step, none, inputs)
    return outputs, largest, jnp.all(jnp.isfinite(outputs))
