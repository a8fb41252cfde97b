"""A validation split shares no content with training, has the size asked for and is seeded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dr.data.split import validation


def contents(numbers: list[int]) -> np.ndarray:
    """A hash for each number [n, 16]."""
    return np.array([list(n.to_bytes(16, "big")) for n in numbers], np.uint8).reshape(-1, 16)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=2, max_size=60), st.integers(1, 20), st.integers(0, 9))
def test_no_content_on_both_sides(numbers: list[int], wanted: int, seed: int) -> None:
    values = np.array(numbers)
    try:
        side = validation(contents(numbers), wanted, seed)
    except ValueError as error:
        smallest = min(np.unique(values, return_counts=True)[1])
        assert "leaves no sample" in str(error) and (wanted < smallest or wanted >= len(values))
        return
    assert not set(values[side]) & set(values[~side])
    assert 1 <= side.sum() <= wanted
    left = wanted - side.sum()  # no whole content would still fit
    assert all((values == v).sum() > left for v in set(values[~side]))


@pytest.mark.parametrize("wanted, size", [(7, 7), (1, 1), (0.25, 25)])
def test_size_without_duplicates(wanted: float, size: int) -> None:
    assert validation(contents(list(range(100))), wanted, 0).sum() == size


def test_the_choice_goes_with_content_and_seed() -> None:
    numbers = list(range(100))
    side = validation(contents(numbers), 20, 1)
    assert (validation(contents(numbers[::-1]), 20, 1)[::-1] == side).all()
    assert (validation(contents(numbers), 20, 2) != side).any()
