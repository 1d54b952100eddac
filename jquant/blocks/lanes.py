"""Calibration windows in lanes: what devices share out, and what makes results the same on any number of them.

The windows are cut into at most `LANES` runs, by their number alone. A lane is worked on by one device, window after
window, by a program that is the same for every device; statistics of lanes are merged in the order of lanes. So no sum
is ever taken in an order that depends on how many devices or processes there are:

    total = ((lane 0 + lane 1) + lane 2) + ..,    lane = ((window a + window a + 1) + ..)

One device goes through the lanes in turn. With several, lane k is device k mod D's; the results visit the first device
of each process to be merged, and every process merges all of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jquant.blocks.offloaded import Offloaded
from jquant.errors import CalibrationError
from jquant.processes import gather_from_all

LANES: Final = 8  # the most devices that calibration can use; more lanes would hold more sums

type Devices = tuple[Any, ...]


@final
@dataclass(frozen=True, eq=False)
class Lanes:
    """Activations of windows, lane by lane.

    Attributes:
      parts: of each lane, its windows on its device; None where that is another process's.
      devices: of the lanes.
    """

    parts: tuple[Any, ...]
    devices: Devices

    @classmethod
    def make(cls, samples: int, devices: Devices, part: Callable[[slice], Any]) -> "Lanes":
        """Returns the lanes of so many windows, on devices.

        Args:
          samples: windows.
          devices: of all processes; empty for the first one of this process.
          part: returns the activations of a run of windows.

        Example:
          >>> lanes = Lanes.make(20, (), lambda run: jnp.zeros((20, 4, 8))[run])
          >>> [part.shape[0] for part in lanes.parts]
          [3, 3, 3, 3, 2, 2, 2, 2]
        """
        runs = lane_runs(samples)
        known = devices or (jax.local_devices()[0],)
        own = tuple(known[index % len(known)] for index in range(len(runs)))
        parts = tuple(
            _put(part(run), device) if _is_here(device) else None for run, device in zip(runs, own, strict=True)
        )
        return cls(parts, own)

    def map(self, function: Callable[[Any, Any], Any], block: Any) -> "Lanes":
        """Returns the lanes that a function of a block and of one lane's windows gives."""
        return dataclasses.replace(self, parts=tuple(self._each(function, block)))

    def merge(
        self, function: Callable[[Any, Any], Any], block: Any, combine: Callable[[Any, Any], Any]
    ) -> dict[str, Any]:
        """Returns the statistics of all lanes, combined in order, on the first device of this process.

        Args:
          function: returns statistics, given a block and one lane's windows.
          block: what the windows go through.
          combine: of two statistics; a function that lives as long as the program, as it is compiled.

        Raises:
          ProcessError: another process is gone.
        """
        total: Any = None
        results = self._each(function, block)
        for result in _exchange(list(results)) if jax.process_count() > 1 else results:
            here = _put(result, jax.local_devices()[0])
            total = here if total is None else _combine(combine, total, here)
        found: dict[str, Any] = total
        return found

    def split(self) -> tuple["Lanes", "Lanes"]:
        """Returns the lanes of both halves, where each part is a pair."""
        pairs = [(None, None) if part is None else part for part in self.parts]
        first, second = (dataclasses.replace(self, parts=half) for half in zip(*pairs, strict=True))
        return first, second

    def gather(self) -> list[Any]:
        """Returns all parts in order, on the first device of this process; those of other processes are fetched."""
        parts = _exchange(list(self.parts)) if jax.process_count() > 1 else self.parts
        return [_put(part, jax.local_devices()[0]) for part in parts]

    def whole(self) -> Float[Array, "samples tokens hidden"]:
        """Returns all windows, on the first device.

        Raises:
          CalibrationError: some are another process's.
        """
        if any(part is None for part in self.parts):
            raise CalibrationError("a block that learns needs all windows in one process; run this recipe with one")
        home = jax.local_devices()[0]
        return jnp.concatenate([_put(part, home) for part in self.parts])

    def samples(self) -> list[tuple[Any, Any]]:
        """Returns a device and one of its lanes for each program that a function of a lane takes on this process."""
        kinds = {
            (device, part.shape, part.dtype): part
            for device, part in zip(self.devices, self.parts, strict=True)
            if part is not None and not isinstance(part, Offloaded)
        }
        return [(device, part) for (device, _, _), part in kinds.items()]

    def _each(self, function: Callable[[Any, Any], Any], block: Any) -> Iterator[Any]:
        """Yields each lane's result in order, None for another process's; devices work at the same time."""
        here = [device for device in dict.fromkeys(self.devices) if _is_here(device)]
        if len(here) < 2:
            for part, device in zip(self.parts, self.devices, strict=True):
                yield None if part is None else function(_put(block, device), part)
            return
        blocks = {device: _put(block, device) for device in here}
        queues = {device: ThreadPoolExecutor(1) for device in here}  # each compiles, and waits for, its own program
        try:
            waiting = [
                None if part is None else queues[device].submit(_finish, function, blocks[device], part)
                for part, device in zip(self.parts, self.devices, strict=True)
            ]
            for one in waiting:
                yield None if one is None else one.result()
        finally:
            for queue in queues.values():
                queue.shutdown(cancel_futures=True)


def lane_runs(samples: int) -> list[slice]:
    """Returns the windows of each lane, by their number alone.

    >>> lane_runs(3)
    [slice(0, 1, None), slice(1, 2, None), slice(2, 3, None)]
    """
    count = min(LANES, samples)
    ends = np.cumsum([samples // count + (index < samples % count) for index in range(count)]).tolist()
    return [slice(first, last) for first, last in zip([0, *ends[:-1]], ends, strict=True)]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _combine(combine: Callable[[Any, Any], Any], total: Any, more: Any) -> Any:
    return combine(total, more)


def _finish(function: Callable[[Any, Any], Any], block: Any, part: Any) -> Any:
    return jax.block_until_ready(function(block, part))


def _exchange(results: list[Any]) -> Iterator[Any]:
    """Yields every lane's result in order, in every process, given those of this one's lanes."""
    known = next(result for result in results if result is not None)
    for result in results:
        mine = jax.tree.map(np.asarray, known if result is None else result)
        owner = np.asarray(jax.process_index() if result is not None else -1)
        owners = np.asarray(gather_from_all(owner)).ravel()
        everyone = gather_from_all(mine)
        at = int(np.argmax(owners >= 0))
        yield jax.tree.map(lambda leaf, at=at: leaf[at], everyone)


def _put(tree: Any, device: Any) -> Any:
    """Returns a tree on a device; what is kept off all devices visits the one that its block is on."""
    return tree if isinstance(tree, Offloaded) else jax.device_put(tree, device)


def _is_here(device: Any) -> bool:
    return bool(device.process_index == jax.process_index())
