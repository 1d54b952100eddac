"""What calibration carries through the model: the inputs of a block, in lanes, and what is measured of them on the way.

Each block is read, run over all windows and dropped; its outputs are the next one's inputs. Wherever a model and its
activations are, and on however many devices, the same programs see the same windows in the same order.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jquant.blocks import ActivationPlace, Devices, Lanes, Offloaded, StatisticStore
from jquant.calibration.store import BlockStore
from jquant.errors import CalibrationError
from jquant.models import LazyModel, embed

type Observe = Callable[
    [Any, Any, Any], tuple[Any, Any]
]  # (block, windows, statistics so far) -> (outputs, statistics)


@dataclass(frozen=True)
class Keeping:
    """Where a run keeps what it makes on the way; no choice changes a bit of the result.

    Attributes:
      store: keeps each finished block on disk; blocks that it already holds are taken from it. None for no store.
      statistics: keeps what is collected on the source's own activations, for other runs; None to keep nothing.
      activations: where inputs of blocks are kept between blocks: on the "device", in "host" memory, or on "disk", in
        a temporary file beside the store.
      devices: over which windows are spread, of all processes; empty for the first one of this process.
      compilers: programs of a block that are compiled at the same time before it is begun; 0 to compile each as it is
        used.
    """

    store: BlockStore | None = None
    statistics: StatisticStore | None = None
    activations: ActivationPlace = "device"
    devices: Devices = ()
    compilers: int = 0

    def here(self) -> "Keeping":
        """Returns this with devices of this process alone, each of which then does all of the work."""
        return replace(self, devices=tuple(one for one in self.devices if one.process_index == jax.process_index()))

    def room(self, shape: tuple[int, int, int], dtype: jax.typing.DTypeLike) -> Offloaded:
        """Returns room for activations off the device.

        Raises:
          CheckpointError: the file cannot be made.
        """
        assert self.activations != "device"
        return Offloaded.empty(shape, dtype, self.activations, None if self.store is None else self.store.path)


NOTHING_KEPT = Keeping()


@contextlib.contextmanager
def open_inputs(model: LazyModel, tokens: Int[Array, "samples length"], keeping: Keeping) -> Iterator[Lanes]:
    """Gives what the first block sees; files that it is kept in end with the context."""
    table = replace(model.abstract, embed_tokens=model.read("embed_tokens"))

    def lane(run: slice) -> Any:
        own = tokens[run]
        if keeping.activations == "device":
            return embed(table, own)
        kept = keeping.room((own.shape[0], own.shape[1], table.config.hidden_size), table.embed_tokens.dtype)
        for index in range(own.shape[0] // kept.piece):
            kept.put(index, embed(table, own[index * kept.piece : (index + 1) * kept.piece]))
        return kept

    inputs = Lanes.make(tokens.shape[0], keeping.devices, lane)
    del table
    with contextlib.ExitStack() as open_files:
        for part in inputs.parts:
            if isinstance(part, Offloaded):
                open_files.enter_context(contextlib.closing(part.file))
        yield inputs


def observe_all(layer: Any, inputs: Lanes, observe: Observe, combine: Callable[[Any, Any], Any]) -> tuple[Lanes, Any]:
    """Runs a block over all windows and measures them.

    Args:
      layer: the block, and what else `observe` needs of it.
      inputs: which are written over where they are off the device.
      observe: returns the outputs of some windows and their statistics, which go on from those of the windows before
        in their lane; None where there are none.
      combine: of the statistics of two lanes.

    Returns:
      The block's outputs, and the statistics of all windows, lane after lane, on the first device.
    """

    def step(own: Any, part: Any) -> tuple[Any, Any]:
        if not isinstance(part, Offloaded):
            return observe(own, part, None)
        found = None
        for index, piece in enumerate(part.pieces()):
            outputs, found = observe(own, piece, found)
            part.put(index, outputs)
        return part, found

    outputs, found = inputs.map(step, layer).split()
    return outputs, functools.reduce(combine, found.gather())


def larger(first: Any, second: Any) -> Any:
    """Returns the larger of two lanes' maxima, and whether both are of finite activations."""
    return jax.tree.map(jnp.maximum, first[0], second[0]), first[1] & second[1]


def refuse_infinite(index: int, finite: Bool[Array, ""]) -> None:
    """Raises CalibrationError, naming the block, unless its activations are finite."""
    if not bool(finite):
        raise CalibrationError(
            f"layers.{index} gives NaN or infinite activations on the calibration text; load the model in a wider "
            "dtype (--dtype float32)"
        )


@jax.jit
def all_finite(outputs: Float[Array, "samples tokens hidden"]) -> Bool[Array, ""]:
    """Tells whether all activations are finite, which a maximum does not: XLA's on CPU loses NaNs."""
    return jnp.all(jnp.isfinite(outputs))
