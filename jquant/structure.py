"""A tree's structure as JSON: node names, static fields, array shapes and dtypes. Reading it runs no code of the file.

node    {"node": "UniformTensor", "fields": {...}}         frozen dataclass  {"value": "UniformFormat", "fields": {...}}
array   {"array": [576, 960], "dtype": "uint8"}            tuple             {"tuple": [...]}
enum    {"enum": "Layout", "name": "PORTABLE"}             plain             null, bool, int, float, string
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp

from jquant import activations, formats, kv, models
from jquant.errors import CheckpointError

_NODES: Final[Mapping[str, type]] = {
    node.__name__: node
    for node in (
        models.Llama,
        models.Stacked,
        models.Block,
        models.Attention,
        models.Mlp,
        models.Linear,
        formats.UniformTensor,
        formats.PreparedFloatTensor,
        formats.PreparedIntegerTensor,
        formats.PreparedWideTensor,
        formats.JoinedPart,
        formats.PreparedBinaryTensor,
        formats.PreparedSpqrTensor,
        formats.PermutedTensor,
        formats.BinaryTensor,
        formats.RazoredTensor,
        formats.CenteredTensor,
        formats.RotatedTensor,
        formats.SpqrTensor,
        formats.QuantizedStatistic,
        formats.Outliers,
        formats.OnlineRotation,
        formats.PreparedRotation,
        kv.ExactKv,
        kv.PerTokenKv,
        kv.Kivi,
        kv.RazorKv,
        kv.DynamicRazorKv,
        kv.KvQuant,
        kv.Float8Kv,
        kv.Codebook,
        kv.PackedPerTokenKv,
        kv.PackedExactKv,
        kv.PackedKivi,
        activations.TokenQuantizer,
        activations.TensorQuantizer,
        activations.OutlierQuantizer,
        activations.RazorQuantizer,
    )
}
_VALUES: Final[Mapping[str, type]] = {
    value.__name__: value
    for value in (
        models.LlamaConfig,
        models.RopeConfig,
        formats.UniformFormat,
        formats.SpqrFormat,
        formats.BinaryFormat,
        formats.RazoredFormat,
        activations.PerToken,
        activations.StaticTensor,
        activations.OutlierSplit,
        activations.ActivationRazor,
    )
}
# Fields that came when there were checkpoints: left out at their default, so that those keep their sha256.
_ADDED: Final[Mapping[str, frozenset[str]]] = {
    models.LlamaConfig.__name__: frozenset({"wide_residual", "prompt_attention"})
}
_ENUMS: Final[Mapping[str, type[enum.Enum]]] = {formats.Layout.__name__: formats.Layout}


def encode_structure(node: Any) -> Any:
    """Returns the JSON-able structure of a tree; arrays become their shape and dtype.

    Raises:
      CheckpointError: something in the tree is none of jquant's kinds; it is named.

    Example:
      >>> encode_structure(models.Linear(kernel=jnp.zeros((2, 3))))["fields"]["kernel"]
      {'array': [2, 3], 'dtype': 'float32'}
    """
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    if isinstance(node, enum.Enum) and type(node).__name__ in _ENUMS:
        return {"enum": type(node).__name__, "name": node.name}
    if isinstance(node, tuple):
        return {"tuple": [encode_structure(item) for item in node]}
    name = type(node).__name__
    for kind, table in (("node", _NODES), ("value", _VALUES)):
        if table.get(name) is type(node):
            added = _ADDED.get(name, frozenset())
            fields = {
                field.name: encode_structure(getattr(node, field.name))
                for field in dataclasses.fields(table[name])
                if field.name not in added or getattr(node, field.name) != field.default
            }
            return {kind: name, "fields": fields}
    if isinstance(node, (jax.Array, jax.ShapeDtypeStruct)) or type(node).__module__ == "numpy":
        return {"array": list(node.shape), "dtype": str(jnp.dtype(node.dtype))}
    raise CheckpointError(f"cannot save a {type(node).__module__}.{name}: it is no node of jquant's model tree")


def decode_structure(value: Any) -> Any:
    """Rebuilds the tree that a structure describes, with `jax.ShapeDtypeStruct` for arrays.

    Raises:
      CheckpointError: the structure names something that this jquant does not have, or lacks a field.
    """
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return jax.ShapeDtypeStruct(tuple(value["array"]), jnp.dtype(value["dtype"]))
    if "tuple" in value:
        return tuple(decode_structure(item) for item in value["tuple"])
    if "enum" in value:
        return _known(_known(_ENUMS, value["enum"]).__members__, value["name"])
    table, name = (_NODES, value["node"]) if "node" in value else (_VALUES, value["value"])
    kind = _known(table, name)
    fields = {field: decode_structure(item) for field, item in value["fields"].items()}
    known = dataclasses.fields(kind)
    surplus = set(fields) - {field.name for field in known}
    if surplus:
        raise CheckpointError(f"{name} has no {', '.join(sorted(surplus))}; a newer jquant wrote this, upgrade")
    absent = dataclasses.MISSING
    lacking = [one.name for one in known if one.name not in fields and one.default is one.default_factory is absent]
    if lacking:
        raise CheckpointError(f"{name} lacks {', '.join(lacking)} in structure.json; the file is damaged")
    return kind(**fields)


def _known(table: Mapping[str, Any], name: str) -> Any:
    if name not in table:
        raise CheckpointError(f"unknown {name!r} in structure.json; known: {', '.join(table)}. Upgrade jquant")
    return table[name]
