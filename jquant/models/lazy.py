"""A model whose arrays stay where they are until they are asked for, so that one beyond memory can be worked on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import jax

from jquant.models.edit import blocks, get, put
from jquant.models.tree import Llama

_TABLE, _NORM, _HEAD = "embed_tokens", "norm", "lm_head"


@final
@dataclass(frozen=True, eq=False)
class LazyModel:
    """A model in two halves: what it is, and a way to its numbers.

    Attributes:
      abstract: the model, layers not stacked, with `jax.ShapeDtypeStruct` (or the arrays themselves) for arrays.
      read: returns the node, or the array, at a path below the model, such as `layers.3.mlp.up_proj`, with its numbers;
        nothing of it is kept.
    """

    abstract: Llama
    read: Callable[[str], Any]


def in_memory(model: Llama) -> LazyModel:
    """Returns a model that is in memory as one that is read by path.

    Example:
      >>> from jquant.models import random_model, tiny_config
      >>> in_memory(random_model(tiny_config(), jax.random.key(0))).read("layers.1.mlp.up_proj").kernel.shape
      (64, 96)
    """
    return LazyModel(model, partial(get, model))


def lazily(model: Llama | LazyModel) -> LazyModel:
    """Returns a model to be read by path, whether it is in memory or not."""
    return model if isinstance(model, LazyModel) else in_memory(model)


def top_nodes(model: Llama) -> tuple[str, ...]:
    """Returns the paths of what a model is read by, one at a time: table, blocks, norm and head, if it has one.

    In the order of their names, which is that of all arrays sorted by path.

    Example:
      >>> from jquant.models import abstract_llama, tiny_config
      >>> top_nodes(abstract_llama(tiny_config()))
      ('embed_tokens', 'layers.0', 'layers.1', 'lm_head', 'norm')
    """
    layers = [f"layers.{index}" for index in range(len(blocks(model)))]
    head = [] if model.lm_head is None else [_HEAD]
    return tuple(sorted([_TABLE, *layers, *head, _NORM], key=lambda node: f"{node}."))


def rewrite(model: LazyModel, transform: Callable[[Llama], Llama]) -> LazyModel:
    """Returns a model whose nodes go through a transform of whole models when they are read, and nothing else does.

    A node is transformed inside a model in which all other arrays are abstract, so that the result is the whole
    transform's, bit for bit.

    Args:
      model: what is read.
      transform: leaves abstract arrays abstract; a block must depend on itself alone, the head on itself, the norm
        and, in a tied model, the table.

    Example:
      >>> from jquant.models import random_model, tiny_config
      >>> doubled = rewrite(
      ...     in_memory(random_model(tiny_config(), jax.random.key(0))), lambda model: put(model, "norm", model.norm)
      ... )
      >>> doubled.read("layers.1.mlp.up_proj").kernel.shape
      (64, 96)
    """
    source: Llama = jax.eval_shape(lambda tree: tree, model.abstract)

    def read(path: str) -> Any:
        parts = path.split(".")
        node = ".".join(parts[:2]) if parts[0] == "layers" else parts[0]
        partial_model = source
        for name in _needed(source, node):
            partial_model = put(partial_model, name, model.read(name))
        return get(transform(partial_model), path)

    return LazyModel(transform(source), read)


def with_blocks(model: LazyModel, abstract: Llama, read_block: Callable[[int], Any]) -> LazyModel:
    """Returns a model whose blocks are read elsewhere.

    Args:
      model: table, norm and head.
      abstract: the new model without its numbers.
      read_block: returns a block by its place.
    """

    def read(path: str) -> Any:
        parts = path.split(".")
        if parts[0] != "layers":
            return model.read(path)
        block = read_block(int(parts[1]))
        return get(block, ".".join(parts[2:])) if parts[2:] else block

    return LazyModel(abstract, read)


def with_head(model: LazyModel, abstract: Llama, read_head: Callable[[], Any]) -> LazyModel:
    """Returns a model whose output projection is read elsewhere.

    Args:
      model: table, blocks and norm.
      abstract: the new model without its numbers.
      read_head: returns the projection.
    """

    def read(path: str) -> Any:
        parts = path.split(".")
        if parts[0] != _HEAD:
            return model.read(path)
        return get(read_head(), ".".join(parts[1:])) if parts[1:] else read_head()

    return LazyModel(abstract, read)


def _needed(model: Llama, node: str) -> tuple[str, ...]:
    """Returns what a transform must have for a node of its result."""
    return (_NORM, _TABLE if model.lm_head is None else _HEAD) if node == _HEAD else (node,)
