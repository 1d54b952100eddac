"""What the processes of one run tell each other, and what one of them says when another is gone.

A process that is killed closes its connections: a collective that waits for it fails at once in the others, but where
the first one is killed, whose end JAX answers by ending the others itself. Nothing here waits without an end.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, Final, NoReturn

import jax
from jax.experimental import multihost_utils

from jquant.errors import ProcessError

_STATUS: Final = re.compile(r"[A-Z_]+: ")  # of XLA, which `jax.jit` raises as a ValueError where a call fails at once


def gather_from_all(tree: Any) -> Any:
    """Returns what every process gives, a leading axis of processes on each leaf, as numpy arrays.

    Args:
      tree: arrays of this process alone, of the same shapes in each.

    Raises:
      ProcessError: another process is gone.
    """
    with _others():
        return multihost_utils.process_allgather(tree)


def meet(what: str) -> None:
    """Waits until every process is here.

    Args:
      what: all of them then know.

    Raises:
      ProcessError: another process is gone.
    """
    with _others():
        multihost_utils.sync_global_devices(what)


def leave(status: int) -> NoReturn:
    """Ends the interpreter, and of several processes this one at once.

    At a usual end JAX waits minutes for the others, which may wait for this one; so they learn of it now.

    Args:
      status: of the process.
    """
    if not jax.distributed.is_initialized():
        sys.exit(status)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


@contextlib.contextmanager
def _others() -> Iterator[None]:
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if not isinstance(error, jax.errors.JaxRuntimeError) and not _STATUS.match(str(error)):
            raise
        reason = str(error).splitlines()[0]
        raise ProcessError(
            f"another process of this run is gone, or cannot be reached: {reason}. See what it said, then give all "
            "commands again, for as many processes as there are then"
        ) from error
