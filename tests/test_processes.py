"""What a process says when another of its run is gone; several real ones are in tests/test_faults.py."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from jquant.errors import ProcessError
from jquant.processes import gather_from_all, leave, meet


def test_a_lost_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise jax.errors.JaxRuntimeError("Gloo AllGather failed: Connection closed by peer [::1]:9906\nand more")

    monkeypatch.setattr(multihost_utils, "process_allgather", fail)
    monkeypatch.setattr(multihost_utils, "sync_global_devices", fail)
    with pytest.raises(ProcessError, match=r"another process of this run is gone.*closed by peer \[::1\]:9906\. See"):
        gather_from_all(np.ones(2))
    with pytest.raises(ProcessError, match="give all commands again"):
        meet("the result is saved")


@pytest.mark.parametrize("word", ["UNKNOWN", "FAILED_PRECONDITION"])
def test_a_process_that_is_lost_before_the_call_is_named_too(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    """A collective that fails as it is called, not later, is `jax.jit`'s ValueError; others of these are mistakes."""

    def fail(tree: object) -> None:
        raise ValueError(f"{word}: Gloo AllGather failed: Connection closed by peer" if tree else "shapes differ")

    monkeypatch.setattr(multihost_utils, "process_allgather", fail)
    with pytest.raises(ProcessError, match=r"another process of this run is gone.*closed by peer"):
        gather_from_all(1)
    with pytest.raises(ValueError, match="shapes differ"):
        gather_from_all(0)


def test_one_process_ends_as_usual() -> None:
    with pytest.raises(SystemExit) as stop:
        leave(2)
    assert stop.value.code == 2
