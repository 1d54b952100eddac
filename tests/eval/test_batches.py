"""Batches: everything once, few shapes, the widths that run the fewest tokens."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.batches import make_batches
from jquant.errors import DataError

LENGTHS = st.lists(st.integers(1, 3000), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 20_000), st.integers(0, 500))
def test_each_sequence_once_in_three_shapes_at_most(lengths: list[int], batch_tokens: int, beyond: int) -> None:
    longest = max(lengths) + beyond
    batches = make_batches(lengths, longest=longest, batch_tokens=batch_tokens)
    assert sorted(index for batch in batches for index in batch.members) == list(range(len(lengths)))
    assert len({(batch.width, batch.rows) for batch in batches}) <= 3
    for batch in batches:
        assert max(lengths[index] for index in batch.members) <= batch.width <= longest
        assert 1 <= len(batch.members) <= batch.rows <= max(1, batch_tokens // batch.width)
    assert [batch.width for batch in batches] == sorted((batch.width for batch in batches), reverse=True)


@given(LENGTHS)
def test_widths_run_the_fewest_tokens(lengths: list[int]) -> None:
    step = -(-max(lengths) // 1024) * 32
    rounded = [-(-length // step) * step for length in lengths]
    ran = sum(batch.width * len(batch.members) for batch in make_batches(lengths, longest=4000))
    fewest = min(
        sum(min(width for width in (*cuts, max(rounded)) if width >= length) for length in rounded)
        for cuts in itertools.combinations_with_replacement(sorted(set(rounded)), 2)
    )
    assert ran == fewest


def test_padding_is_on_the_right_and_rows_are_filled_up() -> None:
    batches = make_batches([2, 3, 1], longest=4, batch_tokens=8)
    assert [(batch.width, batch.rows, batch.members) for batch in batches] == [(4, 2, (1, 0)), (4, 2, (2,))]
    tokens, lengths = batches[1].pad([[1, 2], [3, 4, 5], [6]])
    np.testing.assert_array_equal(tokens, [[6, 0, 0, 0]] * 2)
    np.testing.assert_array_equal(lengths, [1, 1])
    assert make_batches([], longest=4) == []


@pytest.mark.parametrize(("lengths", "batch_tokens"), [([0], 8), ([5], 8), ([1], 0)])
def test_what_does_not_fit_is_refused(lengths: list[int], batch_tokens: int) -> None:
    with pytest.raises(DataError, match=r"expected 1 to 4|give 1 at least"):
        make_batches(lengths, longest=4, batch_tokens=batch_tokens)
