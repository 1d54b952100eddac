"""Fold norms: move the scales of the RMS norms into the linears that read them.

    x / rms(x) * g @ W  =  x / rms(x) @ (diag(g) W)

for q, k, v with the first norm of a block, gate and up with the second, the output projection with the last. What
remains of a norm, x / rms(x) with the config's own epsilon, commutes with every rotation of x (QuaRot,
arXiv:2404.00456, section 3; SliceGPT, arXiv:2401.15024). The norms of queries and keys stay: they act inside a head.
"""

import dataclasses
from collections.abc import Mapping
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jquant.errors import FormatError
from jquant.models import Block, Linear, Llama, blocks, get, put
from jquant.transforms.host import check_unquantized, on_columns
from jquant.types import Leaf

READERS: Final[Mapping[str, tuple[str, ...]]] = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def fold_norms(model: Llama) -> Llama:
    """Returns the model with all scales of its norms in the linears that follow, and norms of ones.

    Args:
      model: an unquantized model whose output projection is its own; abstract will do.

    Raises:
      FormatError: the model is quantized, stacked or tied, or a linear's input is rotated already.

    Example:
      >>> from jquant.models import random_model, tiny_config
      >>> folded = fold_norms(random_model(tiny_config(), jax.random.key(0)))
      >>> bool((folded.norm == 1).all()), bool((folded.layers[1].input_layernorm == 1).all())
      (True, True)
    """
    check_foldable(model)
    assert model.lm_head is not None
    return dataclasses.replace(
        model,
        layers=tuple(_fold_block(layer) for layer in blocks(model)),
        norm=_ones(model.norm),
        lm_head=_fold(model.lm_head, model.norm),
    )


def check_foldable(model: Llama) -> None:
    """Raises FormatError for what `fold_norms` cannot work on."""
    check_unquantized(model)
    if model.lm_head is None:
        raise FormatError(
            "the output projection is tied to the embedding table, which must not take up the final norm's scale: "
            "untie the model first (`untie: {}` in a recipe)"
        )
    for index, layer in enumerate(blocks(model)):
        for name in (name for names in READERS.values() for name in names):
            if get(layer, name).input_rotation is not None:
                raise FormatError(f"layers.{index}.{name} rotates its input: fold norms before rotating")


def _fold_block(layer: Block) -> Block:
    for norm, names in READERS.items():
        scale = getattr(layer, norm)
        for name in names:
            layer = put(layer, name, _fold(get(layer, name), scale))
        layer = put(layer, norm, _ones(scale))
    return layer


def _fold(layer: Linear, scale: Leaf) -> Linear:
    if isinstance(scale, jax.ShapeDtypeStruct):
        return layer
    wide = np.asarray(scale).astype(np.float64)

    def scaled(columns: Float[np.ndarray, "*batch n"]) -> Float[np.ndarray, "*batch n"]:
        return columns * wide

    return dataclasses.replace(layer, kernel=on_columns(scaled, layer.kernel))


def _ones(scale: Leaf) -> Leaf:
    return scale if isinstance(scale, jax.ShapeDtypeStruct) else jnp.ones_like(scale)
