"""Kernels that no GPU has run yet: they are taken in the interpreter, on a GPU only where the user asks for them.

A kernel that is right in the interpreter and compiles for an H100 may still fail there. Until a run on a GPU has
checked it (docs/solvers.md has the list and the command), calibration on a GPU does without. The switch belongs to a
process: what is compiled already stays as it is.
"""

import os
from typing import Final

from jquant.formats.base import Layout

VARIABLE: Final = "JQUANT_UNPROVEN"
UNPROVEN: Final = f"its kernel was not run on a GPU yet: {VARIABLE}=1 takes it"


def unproven(layout: Layout) -> bool:
    """Tells whether a layout's kernels that no GPU has run are to be left alone; read when a program is traced.

    >>> unproven(Layout.SIMULATED), unproven(Layout.PORTABLE)
    (False, False)
    """
    return layout is Layout.HOPPER and os.environ.get(VARIABLE) != "1"
