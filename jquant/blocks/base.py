"""The contract of a block pass: it rewrites one decoder block, given the inputs that the block will see."""

import abc
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jquant.blocks.stopwatch import Stopwatch
from jquant.models import Block, Llama, LlamaConfig
from jquant.quantizers import Diagnostics
from jquant.types import Key, Leaf

# The programs that a pass will run, traced, in the order of use; at its end the outline of the block that the pass
# leaves, None if it does not tell.
type Programs = Generator[jax.stages.Traced, None, Block | None]


@struct.dataclass
class Teacher:
    """The block as it came, on full-precision activations: what a pass that learns compares with.

    Attributes:
      inputs: [samples, tokens, hidden], what the blocks before it produced before they were rewritten.
      outputs: what the block as it came makes of them, with exact keys and values; the same shape.
    """

    inputs: Leaf
    outputs: Leaf


class StatisticStore(abc.ABC):
    """Keeps statistics of the source's own activations, so that several runs use what was collected once."""

    @abc.abstractmethod
    def complete(self, name: str) -> bool:
        """Tells whether a statistic is kept for every block."""

    @abc.abstractmethod
    def get(self, index: int, name: str, empty: Any) -> Any | None:
        """Returns a statistic of one block, or None if it has not been collected.

        Args:
          index: the block's place, from 0.
          name: the statistic's.
          empty: a tree of its structure.
        """

    @abc.abstractmethod
    def put(self, index: int, name: str, statistic: Any) -> None:
        """Keeps a statistic of one block."""


@struct.dataclass
class BlockData:
    """What a pass may know of a block's surroundings.

    Attributes:
      inputs: [samples, tokens, hidden] or `Lanes` of them, what the blocks before it produce; None if no pass asked for
        inputs.
      config: the model's sizes.
      index: the block's place, from 0.
      teacher: the source's own activations around the block; None if no pass asked for a teacher.
      statistics: where statistics of those activations are kept; None to keep none.
      watch: to which passes tell their phases.
    """

    inputs: Any | None
    config: LlamaConfig = struct.field(pytree_node=False)
    index: int = struct.field(pytree_node=False)
    teacher: Teacher | None = None
    statistics: StatisticStore | None = struct.field(pytree_node=False, default=None)
    watch: Stopwatch = struct.field(pytree_node=False, default_factory=Stopwatch)


class BlockPass(abc.ABC):
    """Rewrites one block. Final subclasses are frozen dataclasses of settings."""

    @abc.abstractmethod
    def needs_inputs(self) -> bool:
        """Tells whether calibration inputs must be carried through the blocks."""

    @abc.abstractmethod
    def needs_teacher(self, kept: StatisticStore | None = None) -> bool:
        """Tells whether the source's own activations must be carried through the blocks as well, given what is kept."""

    @abc.abstractmethod
    def check(self, model: Llama) -> None:
        """Raises RecipeError or FormatError for what cannot work on this model; called before any work."""

    @abc.abstractmethod
    def __call__(self, block: Block, data: BlockData, key: Key) -> tuple[Block, dict[str, Diagnostics]]:
        """Returns the new block, and diagnostics by the path of each linear that was solved.

        A pass that learns adds an entry by the block's own path, `layers.3`, whose "losses" are one for each step.
        """

    @abc.abstractmethod
    def programs(self, block: Block, data: BlockData, key: Key) -> Programs:
        """Yields the programs that a call with these arguments will run, for the caller to compile ahead.

        Whether they are compiled ahead changes no result: a call that finds its program compiled runs it, any other
        compiles its own. So a pass may leave out programs that are small, or that only its work decides.

        Args:
          block: the block, or its `outline`.
          data: as for the call.
          key: likewise; it is not used up.
        """


def outline(tree: Any, device: Any | None = None) -> Any:
    """Returns the shapes and dtypes of a tree, and where its arrays are if they are bound to a device.

    Args:
      tree: of arrays, or an outline.
      device: to which all are bound; None to leave them as they are.

    Example:
      >>> outline(jnp.ones((2, 3)))
      ShapeDtypeStruct(shape=(2, 3), dtype=float32)
    """
    bound = None if device is None else jax.sharding.SingleDeviceSharding(device)

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        known = isinstance(leaf, jax.ShapeDtypeStruct)
        own = leaf.sharding if known or leaf.committed else None
        weak = leaf.weak_type if known else jax.typeof(leaf).weak_type
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=bound or own, weak_type=bool(weak))

    return jax.tree.map(one, tree)


def summarize(diagnostics: Diagnostics) -> dict[str, Float[Array, ""]]:
    """Sums per-output diagnostics over outputs; scalars stay."""
    return {name: jnp.sum(values) for name, values in diagnostics.items()}


def split_diagnostics(diagnostics: Diagnostics, sizes: tuple[int, ...]) -> list[Diagnostics]:
    """Cuts the diagnostics of a merged solve back into one for each of its linears."""
    cuts = [sum(sizes[: index + 1]) for index in range(len(sizes) - 1)]
    parts: list[Diagnostics] = [{} for _ in sizes]
    for name, values in diagnostics.items():
        pieces = jnp.split(values, cuts) if values.ndim else [values] * len(sizes)
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = jax.numpy.asarray(piece)
    return parts
