"""Untie: give a model whose output projection is its embedding table a projection of its own, equal to it.

What the final norm and a rotation do to the output projection must not happen to the embedding table (QuaRot, section
3: the norm's scale goes into the head alone).
"""

import dataclasses
from typing import Any

import jax

from jquant.models import Linear, Llama
from jquant.transforms.host import check_unquantized


def untie(model: Llama) -> Llama:
    """Returns the model with `lm_head` = embedding^T; one that has a head of its own comes back as it is.

    Raises:
      FormatError: the model is quantized or stacked.

    Example:
      >>> from jquant.models import random_model, tiny_config
      >>> untied = untie(random_model(tiny_config("smollm2"), jax.random.key(0)))
      >>> untied.lm_head.kernel.shape, untied.config.tie_word_embeddings
      ((64, 128), False)
    """
    check_unquantized(model)
    return own_head(model)


def own_head(model: Llama) -> Llama:
    """Returns the model with an output projection of its own, as `untie`, also where its blocks are quantized.

    >>> from jquant.models import random_model, tiny_config
    >>> own_head(random_model(tiny_config("smollm2"), jax.random.key(0))).config.tie_word_embeddings
    False
    """
    if model.lm_head is not None:
        return model
    table = model.embed_tokens
    abstract = isinstance(table, jax.ShapeDtypeStruct)
    kernel: Any = jax.ShapeDtypeStruct(table.shape[::-1], table.dtype) if abstract else table.T
    config = dataclasses.replace(model.config, tie_word_embeddings=False)
    return dataclasses.replace(model, lm_head=Linear(kernel), config=config)
