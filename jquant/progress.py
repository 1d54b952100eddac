"""Where a job stands, as library functions tell it to whoever called them."""

from collections.abc import Callable
from dataclasses import dataclass

from jquant.report import BlockReport


@dataclass(frozen=True)
class Progress:
    """Where a job stands.

    Attributes:
      stage: what is being done, in words.
      done: steps of the stage that are finished.
      total: steps of the stage; 0 where they cannot be counted.
      block: the block that was just finished, if one was.
    """

    stage: str
    done: int = 0
    total: int = 0
    block: BlockReport | None = None


type OnProgress = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """Does nothing with progress."""
    del progress
