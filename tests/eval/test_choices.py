"""Choices that differ, and which of them are ties, against numbers of bfloat16 themselves."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval import bfloat16_steps, find_other_choices


@given(st.integers(0x0080, 0x7F00), st.integers(0, 127), st.sampled_from([1.0, -1.0]))
def test_steps_count_the_numbers_of_bfloat16_between(bits: int, more: int, sign: float) -> None:
    """Numbers of one power of two lie a step apart each; rounding never moves a number by more than half a step."""
    top = bits | 0x7F  # the largest number of its power of two
    one, other = np.array([top, top - more], np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)
    assert bfloat16_steps(sign * one, sign * other) == more
    between = one - 0.3 * (one - other)
    assert bfloat16_steps(between, float(ml_dtypes.bfloat16(between))) <= 0.5


def test_what_is_no_number_is_no_tie() -> None:
    assert bfloat16_steps(float("nan"), 1.0) == bfloat16_steps(float("inf"), 1.0) == float("inf")


def test_rows_that_choose_alike_are_left_out_and_gaps_are_each_way_s_own() -> None:
    ours = np.array([[1.0, 2.0, 0.0], [33.0, 32.5, 0.0], [8.0, 9.0, 0.0]])
    theirs = np.array([[0.0, 9.0, 3.0], [32.0, 32.25, 0.0], [9.0, 8.0, 0.0]])
    close, far = find_other_choices(ours, theirs)
    assert (close.row, close.tokens, close.gaps, close.is_tie()) == (1, (0, 1), (2.0, 1.0), False)
    assert (far.row, far.tokens, far.is_tie()) == (2, (1, 0), False)
    assert far.gaps == pytest.approx((16.0, 16.0))
    rounded = np.array([[9.625, 9.625]])  # a tie as a run met it: of equal logits the first is chosen
    assert find_other_choices(rounded, np.array([[9.5625, 9.625]]))[0].is_tie()
