"""Runs a function of a model on the devices that hold it together, each of which sees an ordinary smaller model.

Rows of the batch are spread over the mesh's axis `data`; heads and features over `tensor`, as `jquant.sharding` cut
them. Inside, nothing but embedding, head and `ShardedTensor` knows that there are other devices.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped

from jquant.errors import DataError
from jquant.formats import DATA, TENSOR
from jquant.models.tree import Llama, Sharded, Stacked

type OwnFunction = Callable[[Llama, Any, Any], tuple[Any, Any]]


def on_mesh(model: Llama, function: OwnFunction, rows: Any, caches: Any = None) -> tuple[Any, Any]:
    """Returns what a function gives, run on every device on its own part of everything.

    Args:
      model: its layers `Sharded`.
      function: takes the device's own model, rows and caches; returns arrays with rows first, and caches.
      rows: arrays with rows first.
      caches: of all layers, as a function run so returned them; None if there are none yet.

    Raises:
      DataError: the rows cannot be spread evenly.
    """
    sharded: Any = model.layers
    parts = sharded.mesh.shape[DATA]
    for leaf in jax.tree.leaves(rows):
        if leaf.shape[0] % parts:
            raise DataError(
                f"a batch of {leaf.shape[0]} rows over data={parts} devices: give a multiple of {parts} rows, or a "
                "mesh with fewer along data"
            )

    def own(model: Llama, rows: Any, caches: Any) -> tuple[Any, Any]:
        layers = jax.tree.map(lambda leaf: leaf[0], model.layers.layers)  # type: ignore[union-attr]
        smaller = dataclasses.replace(model, layers=layers, config=sharded.config)
        found, kept = function(smaller, rows, jax.tree.map(lambda leaf: leaf[0], caches))
        return found, jax.tree.map(lambda leaf: leaf[None], kept)

    row, cache = PartitionSpec(DATA), cache_spec(sharded)
    return jax.shard_map(
        own,
        mesh=sharded.mesh,
        in_specs=(model_specs(model), row, cache),
        out_specs=(row, cache),
        check_vma=False,  # kernels do not say over which axes their results vary
    )(model, rows, caches)


def replicate(x: Shaped[Array, "*shape"], sharded: Sharded) -> Shaped[Array, "*shape"]:
    """Returns an array that every device, and so every process, has whole."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(sharded.mesh, PartitionSpec()))


def place_cache(model: Llama, layers: Any) -> Any:
    """Returns caches of all layers where a model has them: over its mesh if its layers are `Sharded`."""
    if not isinstance(model.layers, Sharded):
        return layers
    return jax.device_put(layers, NamedSharding(model.layers.mesh, cache_spec(model.layers)))


def cache_spec(sharded: Sharded) -> PartitionSpec:
    """Returns how caches of all layers lie: devices first, then layers if they are stacked, then rows."""
    stacked = isinstance(sharded.layers, Stacked)
    return PartitionSpec(TENSOR, None, DATA) if stacked else PartitionSpec(TENSOR, DATA)


def model_specs(model: Llama) -> Llama:
    """Returns the model with how each of its arrays lies on the mesh in the array's place."""
    sharded: Any = model.layers
    own = PartitionSpec(TENSOR)
    specs: Llama = jax.tree.map(lambda _: PartitionSpec(), model)
    head, columns = specs.lm_head, cast("Any", PartitionSpec(None, TENSOR))
    if head is not None and sharded.vocabulary:
        head = dataclasses.replace(head, kernel=columns)
    return dataclasses.replace(
        specs,
        embed_tokens=cast("Any", own) if sharded.vocabulary else specs.embed_tokens,
        layers=jax.tree.map(lambda _: own, sharded),
        lm_head=head,
    )


def look_up(table: Float[Array, "own hidden"], tokens: Any, vocabulary: int) -> Float[Array, "*batch hidden"]:
    """Returns the rows of tokens from a table of which each device may have a run of rows alone."""
    own = table.shape[0]
    if own == vocabulary:
        return table[tokens]
    places = tokens - jax.lax.axis_index(TENSOR).astype(tokens.dtype) * own
    here = (places >= 0) & (places < own)
    found = jnp.where(here[..., None], table[jnp.clip(places, 0, own - 1)], jnp.zeros((), table.dtype))
    return jax.lax.psum(found, TENSOR)


def gather_logits(logits: Float[Array, "*batch own"], vocabulary: int) -> Float[Array, "*batch vocab"]:
    """Returns the logits of all tokens, of which each device may have its own alone."""
    if logits.shape[-1] == vocabulary:
        return logits
    return jax.lax.all_gather(logits, TENSOR, axis=logits.ndim - 1, tiled=True)
