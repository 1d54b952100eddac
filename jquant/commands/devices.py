"""The options of commands that run on several devices: `--mesh`, and how processes find each other."""

from dataclasses import dataclass
from typing import Annotated, Final

import jax
from cyclopts import Parameter
from jax.sharding import Mesh

from jquant.commands.display import note
from jquant.errors import RecipeError
from jquant.formats import DATA
from jquant.sharding import describe_mesh, join_processes, make_mesh, parse_axes


@Parameter(name="*")
@dataclass(frozen=True)
class Devices:
    """Which devices a command runs on.

    Attributes:
      mesh: devices to spread the work over, such as data=2,tensor=4; one device if not given.
      coordinator: host:port of the first of several processes, or slurm inside a Slurm job.
      processes: how many processes there are.
      process: which of them this is, from 0.
    """

    mesh: Annotated[str | None, Parameter(name="--mesh")] = None
    coordinator: Annotated[str | None, Parameter(name="--coordinator")] = None
    processes: Annotated[int | None, Parameter(name="--processes")] = None
    process: Annotated[int | None, Parameter(name="--process")] = None

    def start(self) -> Mesh | None:
        """Joins the other processes, makes the mesh and tells of it on stderr; None for one device.

        Raises:
          RecipeError: an option does not fit, or there are fewer devices.
        """
        if self.coordinator is not None:
            join_processes(self.coordinator, self.processes, self.process)
        elif (self.processes, self.process) != (None, None):
            raise RecipeError("--processes and --process belong to --coordinator host:port")
        if self.mesh is None:
            if self.coordinator is not None:
                raise RecipeError("several processes need --mesh: how their devices share the work")
            return None
        mesh = make_mesh(*parse_axes(self.mesh))
        if jax.process_count() > len({device.process_index for device in mesh.devices.ravel()}):
            raise RecipeError(f"--mesh {self.mesh} leaves processes without a device; give all {jax.device_count()}")
        if jax.process_index() == 0:
            note(f"mesh: {describe_mesh(mesh)}")
        return mesh


ONE_DEVICE: Final = Devices()


def is_first() -> bool:
    """Tells whether this process is the one that writes files and prints results."""
    return jax.process_index() == 0


def rows_to_fill(mesh: Mesh | None, rows: int) -> int:
    """Returns how many rows a batch lacks to be spread evenly.

    >>> rows_to_fill(None, 3)
    0
    """
    return 0 if mesh is None else -rows % mesh.shape[DATA]
