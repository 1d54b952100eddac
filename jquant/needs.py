"""What a run has in memory at once, from shapes alone: by it `jquant.plan` and `jquant.budget` predict peaks."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jquant.blocks import BlockPass, Distill, piece_size
from jquant.calibration import AlphaSearch
from jquant.costs import (
    codebook_nbytes,
    device_working_nbytes,
    learning_nbytes,
    observing_nbytes,
    rounding_nbytes,
    searching_nbytes,
    training_nbytes,
    working_nbytes,
)
from jquant.exact_passes import LearnRotation, Smooth
from jquant.formats import tree_nbytes
from jquant.kv_passes import CalibrateFloat8Kv, CalibrateKvQuant, CalibrateRazorKv
from jquant.models import Llama, blocks, get, top_nodes
from jquant.passes import ModelPass, QuantizeHead, Sequential
from jquant.recipe import Recipe

type Shapes = Iterable[tuple[int, int]]  # (in, out) of solves


class Needs(NamedTuple):
    """Hold bytes of what a run has in memory at once, by which `jquant.budget` predicts its peak.

    Attributes:
      block: the largest block of the source.
      solved: the largest block of the result.
      node: the largest of the source's table, blocks and head.
      result_node: the same of the result.
      array: the source's largest array.
      activations: the inputs of one block over all calibration text; 0 if none are carried.
      sets: how many such sets there are at once.
      trail: how many more there are where the model is in blocks and gradients go back through all of them.
      piece: the inputs that are on the device at once where they are kept elsewhere.
      working: what a solve, or a block over one window, takes beside all these.
      device_working: the same on a GPU, whose solves hold less.
      movable: whether the inputs can be kept off the device.
    """

    block: int
    solved: int
    node: int
    result_node: int
    array: int
    activations: int
    sets: int
    trail: int
    piece: int
    working: int
    device_working: int
    movable: bool


def measure_needs(model: Llama, result: Llama, recipe: Recipe, heavy: Shapes, light: Shapes) -> Needs:
    """Returns what a run has in memory at once.

    Args:
      model: the source; abstract will do.
      result: what the recipe makes of it.
      recipe: what will be run.
      heavy: the solves that have statistics of their inputs.
      light: the others.
    """
    calibration, passes = recipe.calibration, recipe.passes
    length = calibration.length if calibration else 0
    measuring = [one for one in passes if one.needs_tokens()]
    carried = calibration is not None and bool(measuring)
    shape = (calibration.samples, length, model.config.hidden_size) if calibration and carried else (0, 0, 0)
    dtype = jnp.dtype(model.embed_tokens.dtype)
    parts = block_passes(passes)
    light = {
        *light,
        *((model.config.hidden_size, model.config.vocab_size) for one in passes if isinstance(one, QuantizeHead)),
    }
    others = max(_others(model, recipe), max((rounding_nbytes(*shape) for shape in light), default=0))
    heavy = tuple(heavy)
    return Needs(
        block=max(map(tree_nbytes, blocks(model))),
        solved=max(map(tree_nbytes, blocks(result))),
        node=max(tree_nbytes(get(model, node)) for node in top_nodes(model)),
        result_node=max(tree_nbytes(get(result, node)) for node in top_nodes(result)),
        array=max(map(tree_nbytes, jax.tree.leaves(model))),
        activations=math.prod(shape) * dtype.itemsize,
        sets=2 + 2 * any(isinstance(part, Distill) and part.needs_inputs() for part in parts),
        trail=model.config.num_hidden_layers if any(isinstance(one, CalibrateKvQuant) for one in passes) else 0,
        piece=piece_size(shape, dtype) * math.prod(shape[1:]) * dtype.itemsize if carried else 0,
        working=max(working_nbytes(model.config, length, heavy), others),
        device_working=max(device_working_nbytes(model.config, length, heavy), others),
        movable=carried and all(one.streams() for one in measuring) and not any(one.needs_teacher() for one in parts),
    )


def block_passes(passes: Sequence[ModelPass]) -> list[BlockPass]:
    """Returns all that is done block by block."""
    return [part for one in passes if isinstance(one, Sequential) for part in one.passes]


def _others(model: Llama, recipe: Recipe) -> int:
    """Returns the bytes that passes without a solve take beside models and activations."""
    calibration, config, block = recipe.calibration, model.config, get(model, "layers.0")
    if calibration is None:
        return 0
    length, found = calibration.length, [0]
    if any(isinstance(part, Distill) for part in block_passes(recipe.passes)):
        found.append(training_nbytes(block, config, length))
    for one in recipe.passes:
        if isinstance(one, Smooth) and isinstance(one.alpha, AlphaSearch):
            found.append(searching_nbytes(block, config, length))
        if isinstance(one, CalibrateFloat8Kv | CalibrateRazorKv):
            found.append(observing_nbytes(block, config, length))
        if isinstance(one, LearnRotation):  # on a rotated copy of the model
            found.append(tree_nbytes(model) + learning_nbytes(config, length))
        if isinstance(one, CalibrateKvQuant):
            found.append(codebook_nbytes(block, config, calibration.samples, length))
    return max(found)
