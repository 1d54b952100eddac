"""What rounds the rows of a block in turn: a scan on any machine, or on a Hopper GPU one kernel a block.

Both do the same in the same order (`pallas_kernels.feedback`). The scan takes some XLA kernels for each row, about
1.2 million rows for a model of 8 billion weights; the kernel leaves a solve to its matrix products.
"""

import enum
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp

from jquant.formats import hopper_card
from jquant.types import DType

SCANNED_ROWS: Final = 64  # rows of a scan between matrix products; GPTQ's paper has 128, the codes are the same
KERNEL_ROWS: Final = 128  # rows of a kernel, whose triangle of the factor lies in shared memory


class Solver(enum.Enum):
    """What rounds rows.

    Attributes:
      MACHINE: the kernel where JAX's first device is a Hopper GPU and numbers are float32; the scan otherwise.
      SCAN: XLA.
      HOPPER: the kernel, wherever the program is compiled for a GPU.
      SIMULATED: the kernel in Pallas' interpreter, for tests.
    """

    MACHINE = "machine"
    SCAN = "scan"
    HOPPER = "hopper"
    SIMULATED = "simulated"

    def resolve(self, dtype: DType, rows: int = KERNEL_ROWS) -> "Solver":
        """Returns what rounds blocks of so many rows of a dtype: one of the others, by the kind of the first device.

        >>> Solver.MACHINE.resolve("float64")
        <Solver.SCAN: 'scan'>
        """
        if self is not Solver.MACHINE:
            return self
        served = jnp.dtype(dtype) == jnp.float32 and rows <= KERNEL_ROWS
        hopper = served and hopper_card(jax.devices()[0].device_kind) is not None
        return Solver.HOPPER if hopper else Solver.SCAN

    @property
    def rows(self) -> int:
        """Rows of a block, where the method leaves them open."""
        return SCANNED_ROWS if self is Solver.SCAN else KERNEL_ROWS

    def run(self, kernel: Callable[..., Any], scan: Callable[..., Any], *arrays: Any) -> Any:
        """Rounds a block.

        Args:
          kernel: takes arrays, and how it is simulated or None.
          scan: takes the same arrays and gives the same.
          *arrays: what both are given; trees of arrays.
        """
        if self is Solver.SCAN:
            return scan(*arrays)
        if self is Solver.SIMULATED:
            from pallas_kernels import compat

            return kernel(*arrays, simulate=compat.Simulation())
        return jax.lax.platform_dependent(*arrays, cuda=lambda *given: kernel(*given, simulate=None), default=scan)
