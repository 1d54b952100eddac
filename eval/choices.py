"""Where two ways to compute one model choose different tokens, and whether that was a tie.

Each way prefers its own choice, by a gap between two of its logits. Numbers of bfloat16 lie a step apart, 2^(e - 7)
from 2^e to 2^(e + 1): what lies within one step may be one number once rounded to it, or in either order.
A choice is a tie in bfloat16 where neither way prefers its own by more than a step.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float

_STEP: Final = 2.0**-7  # between neighbours in bfloat16, relative to the power of two below


@dataclass(frozen=True)
class OtherChoice:
    """Hold one row of logits of which two ways choose different tokens.

    Attributes:
      row: which.
      tokens: what the first way chooses, and the second.
      gaps: by how many steps of bfloat16 each way prefers its own choice, at least 0.
    """

    row: int
    tokens: tuple[int, int]
    gaps: tuple[float, float]

    def is_tie(self) -> bool:
        """Tells whether neither way prefers its own choice by more than a step of bfloat16."""
        return max(self.gaps) <= 1.0


def bfloat16_steps(one: float, other: float) -> float:
    """Returns how many steps of bfloat16, at the larger of two numbers, lie between them; infinite for no numbers.

    >>> bfloat16_steps(16.0, 16.25), bfloat16_steps(-3.0, -3.0)
    (2.0, 0.0)
    """
    largest = max(abs(one), abs(other))
    if not np.isfinite(one - other):
        return float("inf")
    return 0.0 if one == other else float(abs(one - other) / (_STEP * 2.0 ** np.floor(np.log2(largest))))


def find_other_choices(
    ours: Float[np.ndarray, "rows vocab"], theirs: Float[np.ndarray, "rows vocab"]
) -> tuple[OtherChoice, ...]:
    """Returns the rows in which the largest logits of two ways are of different tokens, the first of equal ones chosen.

    Args:
      ours: logits of the first way.
      theirs: logits of the second, of the same rows.

    Example:
      >>> one, other = np.array([[16.0, 16.0, 1.0]]), np.array([[16.0, 16.125, 1.0]])
      >>> found = find_other_choices(one, other)[0]
      >>> found.tokens, found.gaps, found.is_tie()
      ((0, 1), (0.0, 1.0), True)
    """
    mine, other = ours.argmax(-1), theirs.argmax(-1)
    return tuple(
        OtherChoice(
            row=int(row),
            tokens=(int(mine[row]), int(other[row])),
            gaps=(
                bfloat16_steps(float(ours[row, mine[row]]), float(ours[row, other[row]])),
                bfloat16_steps(float(theirs[row, other[row]]), float(theirs[row, mine[row]])),
            ),
        )
        for row in np.flatnonzero(mine != other)
    )
