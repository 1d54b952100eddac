"""What a checkpoint holds, read from its headers: format and bits of every linear, and what happens to its input."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jquant.formats import QuantizedTensor, tree_nbytes
from jquant.models import Linear, Llama, Stacked, linears


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
    """

    path: str
    shape: tuple[int, ...]
    format: str
    bits_per_weight: float
    relative_error: float | None = None
    input: str = ""


@dataclass(frozen=True)
class Facts:
    """A model as it is stored.

    Attributes:
      linears: the linears of all blocks, in order.
      structures: how many different structures the blocks have; each is compiled on its own.
      nbytes: bytes of all arrays.
    """

    linears: tuple[LinearFacts, ...]
    structures: int
    nbytes: int

    def bits_per_weight(self) -> float:
        """Returns the bits per weight of all linears of the blocks taken together."""
        weights = [math.prod(row.shape) for row in self.linears]
        bits = [row.bits_per_weight * size for row, size in zip(self.linears, weights, strict=True)]
        return sum(bits) / sum(weights)


def inspect_model(model: Llama, report: Mapping[str, Any] | None = None) -> Facts:
    """Lists what a model holds.

    Args:
      model: the model, or an abstract one; its layers are a tuple.
      report: the report.json of the run that made it.

    Returns:
      The facts.

    Example:
      >>> from jquant.models import abstract_llama, tiny_config
      >>> facts = inspect_model(abstract_llama(tiny_config(), "bfloat16"))
      >>> facts.linears[0].format, facts.bits_per_weight(), facts.structures
      ('bfloat16', 16.0, 1)
    """
    blocks = (report or {}).get("blocks", ())
    errors = {row["path"]: row["relative_error"] for block in blocks for row in block["linears"]}
    rows = tuple(
        LinearFacts(
            path=path,
            shape=tuple(layer.kernel.shape),
            format=describe_format(layer.kernel),
            bits_per_weight=8.0 * tree_nbytes(layer.kernel) / math.prod(layer.kernel.shape),
            relative_error=errors.get(path),
            input=describe_input(layer),
        )
        for path, layer in linears(model)
    )
    return Facts(rows, count_structures(model), tree_nbytes(model))


def count_structures(model: Llama) -> int:
    """Returns how many different structures the blocks have: nodes, static settings, shapes and dtypes."""
    if isinstance(model.layers, Stacked):
        return 1
    return len(
        {
            (jax.tree.structure(block), tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(block)))
            for block in model.layers
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
