"""Where the seconds of a block go: each phase is waited for, so that none is counted as the next one's."""

import time
from collections.abc import Callable
from typing import final

import jax


@final
class Stopwatch:
    """Adds up the seconds of named phases.

    Attributes:
      seconds: of each phase, in the order in which they came first.
    """

    def __init__(self) -> None:
        """Begins without phases."""
        self.seconds: dict[str, float] = {}

    def time[**P, T](self, phase: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Returns what a function of some arguments gives, once its arrays are there.

        Args:
          phase: to which its seconds are added; programs that it compiles count.
          function: what is timed.
          *args: of the function.
          **kwargs: likewise.

        Example:
          >>> watch = Stopwatch()
          >>> watch.time("add", jax.numpy.add, 1, 2).item(), list(watch.seconds)
          (3, ['add'])
        """
        started = time.monotonic()
        result: T = jax.block_until_ready(function(*args, **kwargs))
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - started
        return result
