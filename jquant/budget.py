"""Memory of a run: how much there is, how much each way to work needs, which way is taken, and what the run took.

No way changes a bit of the result. "whole" loads the model and keeps the result beside it; "blocks" reads one block at
a time and leaves the result on disk. Activations are all on the device, or some windows at a time, the others in host
memory or in a file. Where the device is the CPU there is one memory for all, and "host" is no way of its own.

Left to itself ("auto"), a run takes the first way that is predicted to fit 80 % of what is free:

    whole, device  >  blocks, device  >  blocks, host  >  blocks, disk

and the last one that its passes can take if none is.
"""

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import jax

from jquant.blocks import ActivationPlace
from jquant.checkpoint import PART_NBYTES
from jquant.errors import RecipeError
from jquant.passes import check_streaming
from jquant.plan import Plan
from jquant.recipe import Recipe

type ModelPlace = Literal["whole", "blocks"]

_SHARE: Final = 0.8  # of what is free that a run may be predicted to need
_BASE: Final = 500 * 2**20  # bytes of a process before it reads a model: Python, XLA, its programs; measured here
_READING: Final = 3.5  # copies of an array while it is read: mapped pages, bytes, what is finite, the array turned
_WRITING: Final = 2  # copies of a part while it is written: its arrays, what Orbax has not written yet
_PIECES: Final = 3  # pieces of activations alive at once, where they are not on the device
_ENDLESS: Final = 2**62


class Memory(NamedTuple):
    """Hold bytes of the host's memory and of the device's; the second is 0 where the device is the CPU."""

    host: int
    device: int


@dataclass(frozen=True)
class Way:
    """How a run works.

    Attributes:
      model: "whole" in memory, or in "blocks", one after another.
      activations: where the inputs of blocks are kept between blocks.
    """

    model: ModelPlace = "whole"
    activations: ActivationPlace = "device"


def available() -> Memory:
    """Returns what is free on this machine and its first device."""
    rows = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    host = int(rows["MemAvailable"].split()[0]) * 2**10 if "MemAvailable" in rows else _ENDLESS
    facts: dict[str, Any] = jax.local_devices()[0].memory_stats() or {}
    if jax.default_backend() == "cpu":
        return Memory(host, 0)
    return Memory(host, facts.get("bytes_limit", _ENDLESS) - facts.get("bytes_in_use", 0))


def predict(figures: Plan, way: Way, *, has_device: bool) -> Memory:
    """Returns the peaks that a run is expected to have.

    Args:
      figures: its plan.
      way: how it works.
      has_device: whether the device has a memory of its own.
    """
    needs = figures.needs
    sets = needs.sets + (needs.trail if way.model == "blocks" else 0)
    kept = sets * needs.activations
    piece = min(kept, _PIECES * needs.piece)
    transient = int((_READING - 1) * needs.array)
    if way.model == "whole":
        held = figures.source_nbytes + figures.store_nbytes
        reading = figures.source_nbytes + transient
    else:
        held = max(needs.block + needs.solved, needs.node)
        reading = needs.node + transient + min(figures.nbytes, PART_NBYTES)  # what was written lingers
    solving = (
        held
        + (needs.device_working if has_device else needs.working)
        + (kept if way.activations == "device" else piece)
    )
    writing = (_WRITING if way.model == "blocks" else 1) * max(min(figures.nbytes, PART_NBYTES), needs.result_node)
    in_memory = (sets - needs.sets + 1) * needs.activations if way.activations == "host" else 0
    if has_device:
        return Memory(_BASE + in_memory + max(transient, writing), max(solving, needs.node))
    ending = writing + (figures.store_nbytes + figures.source_nbytes if way.model == "whole" else 0)
    return Memory(_BASE + in_memory + max(solving, reading, ending), 0)


def activations_on_disk(figures: Plan, way: Way) -> int:
    """Returns the bytes of the file that activations are kept in, 0 where they are kept elsewhere.

    Args:
      figures: a run's plan.
      way: how it works.
    """
    sets = 1 + (figures.needs.trail if way.model == "blocks" else 0)
    return sets * figures.needs.activations if way.activations == "disk" else 0


def choose(
    figures: Plan,
    recipe: Recipe,
    memory: ModelPlace | Literal["auto"],
    activations: ActivationPlace | Literal["auto"],
    free: Memory,
) -> Way:
    """Returns how a run works: what is asked for, and the rule of this module for what is left open.

    Args:
      figures: the run's plan.
      recipe: what is run.
      memory: where the model is; "auto" to choose.
      activations: where its activations are; "auto" to choose.
      free: what there is, as `available` tells.

    Raises:
      RecipeError: blocks are asked for, or a place off the device, and a pass needs the whole model in memory.
    """
    has_device = free.device > 0
    if memory == "blocks":
        check_streaming(recipe.passes)
    if activations == "host" and not has_device:
        raise RecipeError(
            "the device is the CPU, whose memory is the host's: keep activations on the device or on disk"
        )
    if activations not in ("auto", "device") and not figures.needs.movable:
        raise RecipeError(
            f"activations are to be kept on {activations}, but this recipe has none, or needs them on the device: "
            "leave the choice open"
        )
    streams = all(one.streams() for one in recipe.passes)
    ways = [Way("whole", "device"), Way("blocks", "device"), Way("blocks", "host"), Way("blocks", "disk")]
    ways = [Way("whole", "host"), Way("whole", "disk"), *ways] if activations not in ("auto", "device") else ways
    fitting = [
        way
        for way in ways
        if memory in ("auto", way.model) and activations in ("auto", way.activations)
        if (streams or way.model == "whole") and (has_device or way.activations != "host")
        if activations != "auto" or way.activations == "device" or figures.needs.movable
    ]
    for way in fitting:
        need = predict(figures, way, has_device=has_device)
        if need.host <= _SHARE * free.host and need.device <= _SHARE * free.device:
            return way
    return fitting[-1]


def measure() -> Memory:
    """Returns the peaks of this process so far: resident memory by the operating system, the device's by XLA."""
    rows = dict(line.split(":", 1) for line in _read("/proc/self/status").splitlines() if ":" in line)
    peak = rows["VmHWM"].split()[0] if "VmHWM" in rows else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts: dict[str, Any] = jax.local_devices()[0].memory_stats() or {}
    own = 0 if jax.default_backend() == "cpu" else int(facts.get("peak_bytes_in_use", 0))
    return Memory(int(peak) * 2**10, own)


def describe_memory(figures: Plan, way: Way) -> dict[str, Any]:
    """Returns what a report says of a run's memory, when it is done: how it worked, its peaks predicted and measured.

    Args:
      figures: the run's plan.
      way: how it worked.
    """
    has_device = jax.default_backend() != "cpu"
    predicted, measured = predict(figures, way, has_device=has_device), measure()
    return {
        "model": way.model,
        "activations": way.activations,
        "predicted host bytes": predicted.host,
        "measured host bytes": measured.host,
        "predicted device bytes": predicted.device if has_device else None,
        "measured device bytes": measured.device if has_device else None,
    }


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""
