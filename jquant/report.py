"""What a run says of itself: one row for each linear that was solved, and the totals. Plain data, JSON-able."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LinearReport:
    """One linear after its solve.

    Attributes:
      path: the linear's path, such as `layers.0.mlp.up_proj`.
      format: the class that holds the packed weight, such as `UniformTensor`.
      bits_per_weight: measured on the packed arrays.
      relative_error: |w - q| / |w|, Frobenius.
      proxy_loss: tr((w - q)^T H (w - q)), H the mean of x x^T; None for methods that use no Hessian.
      rtn_proxy_loss: the same for rounding to nearest on the same grid rule.
      damping: share of H's mean diagonal that the solve needed.
    """

    path: str
    format: str
    bits_per_weight: float
    relative_error: float
    proxy_loss: float | None = None
    rtn_proxy_loss: float | None = None
    damping: float | None = None


@dataclass(frozen=True)
class BlockReport:
    """One block of a run.

    Attributes:
      index: its place, from 0.
      linears: one row for each linear that was solved.
      seconds: what it took.
      losses: where the block was trained, the loss of each step before its update.
      phases: seconds of what was timed by itself, such as "compile", "collect mlp_input", "solve mlp_input" and
        "advance", which runs the windows through the solved block and is not part of `seconds`; programs that were
        not compiled ahead count to the phase that used them first.
    """

    index: int
    linears: tuple[LinearReport, ...]
    seconds: float
    losses: tuple[float, ...] = ()
    phases: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """A whole run.

    Attributes:
      blocks: one entry for each block that a pass solved.
      details: what else the run wants to be known by: recipe digest, data provenance, seconds, versions.
    """

    blocks: tuple[BlockReport, ...] = ()
    details: tuple[tuple[str, Any], ...] = ()

    def linears(self) -> tuple[LinearReport, ...]:
        """Returns all rows, in order."""
        return tuple(row for block in self.blocks for row in block.linears)

    def merge(self, other: "Report") -> "Report":
        """Returns this report followed by another."""
        return Report(self.blocks + other.blocks, self.details + other.details)

    def to_json(self) -> str:
        """Returns the report as indented JSON."""
        value = {"details": dict(self.details), "blocks": [dataclasses.asdict(block) for block in self.blocks]}
        return json.dumps(value, indent=1, default=str)


def block_report_from_dict(value: dict[str, Any]) -> BlockReport:
    """Reads back one block of `Report.to_json`."""
    rows = tuple(LinearReport(**row) for row in value["linears"])
    losses = tuple(value.get("losses", ()))
    phases = dict(value.get("phases", {}))
    return BlockReport(index=value["index"], linears=rows, seconds=value["seconds"], losses=losses, phases=phases)
