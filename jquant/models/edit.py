"""Edits by path: new trees, nothing changed in place. A path reads as in Hugging Face: `layers.3.mlp.up_proj`."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final

from jquant.errors import FormatError
from jquant.kv import KvCodec
from jquant.models.tree import Block, Linear, Llama, Sharded, Stacked

BLOCK_LINEARS: Final = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def get(node: Any, path: str) -> Any:
    """Returns what stands at a path below a node; numbers index tuples.

    Raises:
      FormatError: there is no such path.
    """
    for part in path.split("."):
        try:
            node = node[int(part)] if part.isdigit() else getattr(node, part)
        except (AttributeError, IndexError, TypeError) as error:
            raise FormatError(f"no {part!r} in path {path!r}: {type(node).__name__} has none") from error
    return node


def put[T](node: T, path: str, value: Any) -> T:
    """Returns a copy of a node with `value` at a path.

    Raises:
      FormatError: there is no such path.
    """
    get(node, path)
    return _put(node, path.split("."), value)


def linear_paths(model: Llama) -> tuple[str, ...]:
    """Returns the paths of all linears of all blocks, in order; the head and the embedding are not among them."""
    return tuple(f"layers.{index}.{name}" for index in range(len(blocks(model))) for name in BLOCK_LINEARS)


def linears(model: Llama) -> Iterator[tuple[str, Linear]]:
    """Yields (path, linear) for every linear of every block."""
    for path in linear_paths(model):
        yield path, get(model, path)


def map_linears(model: Llama, function: Callable[[str, Linear], Linear]) -> Llama:
    """Returns the model with every block's linears replaced by `function(path, linear)`."""
    layers = []
    for index, block in enumerate(blocks(model)):
        for name in BLOCK_LINEARS:
            block = put(block, name, function(f"layers.{index}.{name}", get(block, name)))
        layers.append(block)
    return dataclasses.replace(model, layers=tuple(layers))


def set_kv_codec(model: Llama, codec: KvCodec) -> Llama:
    """Returns the model with `codec` in every layer."""
    layers = tuple(put(block, "self_attn.kv_codec", codec) for block in blocks(model))
    return dataclasses.replace(model, layers=layers)


def blocks(model: Llama) -> tuple[Block, ...]:
    """Returns the blocks of a model whose layers are not stacked.

    Raises:
      FormatError: they are, or spread over devices.
    """
    if isinstance(model.layers, Sharded):
        raise FormatError("the layers are spread over the devices of a mesh; edit the model before `shard`")
    if isinstance(model.layers, Stacked):
        raise FormatError("the layers are stacked; edit the model before stack_layers")
    return model.layers


def _put(node: Any, parts: list[str], value: Any) -> Any:
    part, rest = parts[0], parts[1:]
    if part.isdigit():
        index = int(part)
        return (*node[:index], _put(node[index], rest, value) if rest else value, *node[index + 1 :])
    return dataclasses.replace(node, **{part: _put(getattr(node, part), rest, value) if rest else value})
