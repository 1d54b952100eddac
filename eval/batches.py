"""Batches of sequences of unequal lengths, in few shapes, as each shape is compiled.

Lengths n_i are padded on the right to one of at most three widths w_1 < w_2 < w_3, chosen so that the tokens that run,
sum_i min {w : w >= n_i}, are fewest.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Int32

from jquant.errors import DataError

BATCH_TOKENS: Final = 8192  # tokens, padding counted, that go through a model at once
_SHAPES: Final = 3
_STEP: Final = 32  # widths are multiples of it, so that tasks of like lengths share programs
_CANDIDATES: Final = 32  # widths to choose from, at most: 465 choices of three


@dataclass(frozen=True)
class Batch:
    """Hold what goes through a model at once.

    Attributes:
      width: tokens of a row, padding counted.
      rows: rows of the program; those without a member are filled up.
      members: which of the sequences are in it, the longest first.
    """

    width: int
    rows: int
    members: tuple[int, ...]

    def pad(
        self, sequences: Sequence[Sequence[int]]
    ) -> tuple[Int32[np.ndarray, "rows width"], Int32[np.ndarray, "rows"]]:
        """Return the members' tokens, padded on the right, and their lengths; the first member fills further rows."""
        filled = [sequences[index] for index in self.members]
        filled += filled[:1] * (self.rows - len(filled))
        tokens = np.zeros((self.rows, self.width), np.int32)
        for row, sequence in zip(tokens, filled, strict=True):
            row[: len(sequence)] = sequence
        return tokens, np.asarray([len(sequence) for sequence in filled], np.int32)


def make_batches(lengths: Sequence[int], *, longest: int, batch_tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Divide sequences into batches of at most three shapes, the longest sequences first.

    Args:
      lengths: tokens of each sequence, at least 1.
      longest: the greatest width there may be, such as the model's context.
      batch_tokens: tokens of a batch, padding counted; a batch has one row at least.

    Raises:
      DataError: a length is below 1 or above `longest`, or `batch_tokens` is below 1.

    Example:
      >>> [(batch.width, batch.rows, batch.members) for batch in make_batches([5, 90, 7], longest=64 + 32)]
      [(96, 1, (1,)), (32, 2, (2, 0))]
    """
    if batch_tokens < 1:
        raise DataError(f"batch_tokens={batch_tokens}: give 1 at least")
    if not lengths:
        return []
    if min(lengths) < 1 or max(lengths) > longest:
        raise DataError(f"sequences of {min(lengths)} to {max(lengths)} tokens; expected 1 to {longest}")
    order = np.argsort(-np.asarray(lengths), kind="stable")
    widths = _widths(np.asarray(lengths), longest)
    batches = []
    for width, shorter in zip(reversed(widths), [*reversed(widths[:-1]), 0], strict=True):
        members = [int(index) for index in order if shorter < lengths[index] <= width]
        rows = min(max(1, batch_tokens // width), len(members))
        batches += [Batch(width, rows, part) for part in itertools.batched(members, rows)]
    return batches


def _widths(lengths: np.ndarray, longest: int) -> list[int]:
    """Return the widths that run the fewest tokens, ascending."""
    step = -(-int(lengths.max()) // (_CANDIDATES * _STEP)) * _STEP
    rounded, counts = np.unique(np.minimum(-(-lengths // step) * step, longest), return_counts=True)
    within = [0, *np.cumsum(counts).tolist()]  # sequences that fit the first widths
    last = len(rounded)

    def tokens(cuts: tuple[int, ...]) -> int:
        ends = (*cuts, last)
        return sum(
            int(rounded[end - 1]) * (within[end] - within[start]) for start, end in zip((0, *cuts), ends, strict=True)
        )

    chosen = min(itertools.combinations(range(1, last), min(_SHAPES, last) - 1), key=tokens)
    return [int(rounded[end - 1]) for end in (*chosen, last)]
