"""Other ways to hold a model, for Flax users: the `{"params": ...}` nested dict and an `nnx.Module`.

Both are thin: the tree of `jquant.models.tree` stays the model. Import this module by name; it loads `flax.nnx`.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx, serialization
from jaxtyping import Array, Float, Int

from jquant.models.llama import forward
from jquant.models.tree import Llama


def params_view(model: Llama) -> dict[str, Any]:
    """Returns {"params": nested dict of arrays}, keyed as the tree is; packed weights appear as their leaves.

    Example:
      >>> from jquant.models import random_model, tiny_config
      >>> view = params_view(random_model(tiny_config(), jax.random.key(0)))
      >>> view["params"]["layers"]["0"]["mlp"]["up_proj"]["kernel"].shape
      (64, 96)
    """
    return {"params": serialization.to_state_dict(model)}


def from_params_view(template: Llama, view: Mapping[str, Any]) -> Llama:
    """Returns a model with the template's structure and the view's arrays.

    Raises:
      ValueError: the view's keys are not the template's (from `flax.serialization`, which names them).
    """
    return serialization.from_state_dict(template, view["params"])


class LlamaModule(nnx.Module):
    """A model as an `nnx.Module`: `module(tokens)` gives logits; `nnx.split`, `nnx.merge` and `nnx.jit` work on it.

    The leaves of the tree are held as one list of `nnx.Param`; the structure is static. Integer leaves (packed
    codes) are Params too, so `nnx.state(module, nnx.Param)` is the whole model.

    Example:
      >>> from jquant.models import random_model, tiny_config
      >>> module = LlamaModule(random_model(tiny_config(), jax.random.key(0)))
      >>> module(jax.numpy.zeros((1, 3), int)).shape
      (1, 3, 128)
    """

    def __init__(self, model: Llama) -> None:
        """Wraps a model; the arrays are shared, not copied."""
        leaves, self.structure = jax.tree.flatten(model)
        self.leaves = nnx.List([nnx.Param(leaf) for leaf in leaves])

    def model(self) -> Llama:
        """Returns the tree with the module's present arrays."""
        return jax.tree.unflatten(self.structure, [leaf[...] for leaf in self.leaves])

    def __call__(self, tokens: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens vocab"]:
        """Returns the logits of every position."""
        return forward(self.model(), tokens)
