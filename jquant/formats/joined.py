"""Prepared weights of linears that share an input, as one: a kernel that makes all outputs at once.

For few tokens a product takes as long as its weight takes to read, and a kernel for a small weight cannot fill a GPU;
queries, keys and values in one product are read at the speed of the largest. The first linear holds the whole,
[in, sum of outs], the others a `JoinedPart`. Only whole tiles are joined: what is filled up along its outputs stays
apart.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Final, final

import jax
from flax import struct

from jquant.formats.prepared import PreparedFloatTensor, PreparedIntegerTensor
from jquant.formats.prepared_wide import PreparedWideTensor

type _Prepared = PreparedFloatTensor | PreparedIntegerTensor | PreparedWideTensor

_PREPARED: Final = (PreparedFloatTensor, PreparedIntegerTensor, PreparedWideTensor)


@final
@struct.dataclass
class JoinedPart:
    """Stands for a weight whose numbers lie in another linear's.

    Attributes:
      shape: (in, out) of the weight that it stands for.
    """

    shape: tuple[int, int] = struct.field(pytree_node=False)


def can_join(weights: Sequence[Any]) -> bool:
    """Tells whether weights are prepared alike and have whole tiles of outputs, so that their arrays can be joined.

    >>> can_join([1, 2])
    False
    """
    if not all(isinstance(weight, _PREPARED) for weight in weights):
        return False
    kinds = {(type(one), one.format, one.layout, one.shape[0]) for one in weights}
    return len(kinds) == 1 and all(one.codes.shape[-2] == one.shape[1] for one in weights)


def join_weights[T: _Prepared](weights: Sequence[T]) -> T:
    """Returns one weight that has the outputs of several behind each other; `can_join` tells which."""
    first = weights[0]
    arrays = {name: _concatenate([getattr(one, name) for one in weights], axis) for name, axis in _axes(first).items()}
    return dataclasses.replace(first, **arrays, shape=(first.shape[0], sum(one.shape[1] for one in weights)))


def split_weights[T: _Prepared](weight: T, sizes: Sequence[int]) -> tuple[T, ...]:
    """Returns the weights, of so many outputs each, of which a weight was joined."""
    parts, start = [], 0
    for size in sizes:
        arrays = {name: _slice(getattr(weight, name), axis, start, size) for name, axis in _axes(weight).items()}
        parts.append(dataclasses.replace(weight, **arrays, shape=(weight.shape[0], size)))
        start += size
    return tuple(parts)


def _axes(weight: _Prepared) -> dict[str, int]:
    """Returns the axis of outputs of each array, from behind, so that stacked weights can be joined too."""
    fields = [field.name for field in dataclasses.fields(weight) if field.metadata.get("pytree_node", True)]
    return {name: -2 if name == "codes" else -1 for name in fields}


def _concatenate(arrays: list[Any], axis: int) -> Any:
    return None if arrays[0] is None else jax.numpy.concatenate(arrays, axis=axis)


def _slice(array: Any, axis: int, start: int, size: int) -> Any:
    return None if array is None else jax.lax.slice_in_dim(array, start, start + size, axis=axis)
