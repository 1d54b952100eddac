"""The two ends of a model: tokens become hidden states, and hidden states become logits."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jquant.formats import QuantizedTensor
from jquant.models.layers import linear, rms_norm
from jquant.models.mesh import gather_logits, look_up
from jquant.models.tree import Linear, Llama
from jquant.types import compute_dtype


def embed(model: Llama, tokens: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens hidden"]:
    """Looks the tokens up in the embedding table, in the dtype of the residual stream."""
    found = look_up(model.embed_tokens, tokens, model.config.vocab_size)
    return found.astype(model.config.residual_dtype(found.dtype))


def head(model: Llama, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
    """Returns the logits of hidden states: the final norm, then the output projection, in float32 or wider."""
    config = model.config
    return project(model, rms_norm(x, model.norm, config.rms_norm_eps, config.norm_dtype(x.dtype)))


def project(model: Llama, normed: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
    """Returns the logits of normed states, in float32 or wider.

    A head of numbers gives its sums as they are. Rounded to bfloat16, whose step is 1/8 from 16 on, the two best logits
    were often the same number, and the token a matter of their order.
    """
    layer = Linear(model.embed_tokens.T) if model.lm_head is None else model.lm_head
    weight: Any = layer.kernel
    wide = compute_dtype(normed.dtype)
    more = (layer.bias, layer.input_rotation, layer.input_quantizer)
    if isinstance(weight, QuantizedTensor) or any(one is not None for one in more):
        logits = linear(layer, normed)[0].astype(wide)
    else:
        logits = jnp.matmul(normed, weight.astype(normed.dtype), preferred_element_type=wide)
    return gather_logits(logits, model.config.vocab_size)
