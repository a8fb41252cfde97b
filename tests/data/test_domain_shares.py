"""Shares of domains: an average that keeps its sum, and the nearest shares between bounds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dr.data.domain_shares import averaged, between, whole

NAN, INF = float("nan"), float("inf")


def average(a: list[float], w: list[float], present: list[float], rate: float) -> list[float]:
    tensors = (torch.tensor(x, dtype=torch.float64) for x in (a, w, present))
    found: list[float] = averaged(*tensors, rate).tolist()
    return found


def test_the_average_moves_towards_the_weights_shares() -> None:
    assert average([0.5, 0.3, 0.2], [3.0, 1.0, -5.0], [1, 1, 1], 0.5) == pytest.approx(
        [0.5 * 0.5 + 0.5 * 0.75, 0.5 * 0.3 + 0.5 * 0.25, 0.1], abs=1e-15
    )


def test_a_domain_without_samples_keeps_its_average() -> None:
    """Whatever its zero row's weight was; the others share what they had together."""
    found = average([0.5, 0.3, 0.2], [9.0, 1.0, 3.0], [0, 1, 1], 1.0)
    assert found == pytest.approx([0.5, 0.125, 0.375], abs=1e-15)


@pytest.mark.parametrize("w", [[0.0, 0.0], [-1.0, -2.0], [NAN, 1.0], [INF, 1.0]])
def test_weights_that_say_nothing_change_nothing(w: list[float]) -> None:
    assert average([0.7, 0.3], w, [1, 1], 0.5) == [0.7, 0.3]


cases = st.integers(1, 7).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(0, 1), min_size=n, max_size=n),
        st.lists(st.integers(1, 1000), min_size=n, max_size=n),
        st.floats(0, 1), st.floats(1, 20),
    )
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(cases)
def test_shares_are_the_nearest_between_the_bounds(
    case: tuple[list[float], list[int], float, float],
) -> None:
    """KKT: the slope (p - a)/b is one number where no bound holds, not less where the lower one
    does, not more where the upper one does."""
    a, ratio, low, high = case
    a = [x / sum(a) for x in a] if sum(a) > 1e-3 else [1 / len(a)] * len(a)
    b = whole(ratio)
    total = sum(b)
    found = between(a, b, low, high)
    assert sum(found) == total
    near = 1e-9
    p, given_b = [x / total for x in found], [x / total for x in b]
    slopes = {-1: [], 0: [], 1: []}  # type: ignore[var-annotated]
    for share, mean, base in zip(p, a, given_b, strict=True):
        assert low * base - near <= share <= high * base + near
        at_low, at_high = share <= low * base + near, share >= high * base - near
        if at_low and at_high:
            continue
        slopes[-1 if at_low else 1 if at_high else 0].append((share - mean) / base)
    free = slopes[0]
    assert not free or max(free) - min(free) < 1e-4
    lower = min([*free, *slopes[-1]], default=INF)
    upper = max([*free, *slopes[1]], default=-INF)
    assert max(slopes[1], default=-INF) <= lower + 1e-4
    assert min(slopes[-1], default=INF) >= upper - 1e-4


def test_known_shares() -> None:
    b = whole([1, 1, 2])
    total = sum(b)
    cases = {
        (0.25, 0.25, 0.5): (0.25, 0.25, 0.5),  # what is given
        (0.4, 0.1, 0.5): (0.4, 0.1, 0.5),  # within the bounds
        (0.0, 0.5, 0.5): (0.025, 0.5 - 0.025 / 3, 0.5 - 0.05 / 3),
        (1.0, 0.0, 0.0): (0.5, 0.5 / 3, 1 / 3),  # what is over goes to the others as they are given
    }
    for a, expected in cases.items():
        found = between(a, b, 0.1, 2.0)
        assert [x / total for x in found] == pytest.approx(list(expected), abs=1e-9), a


@pytest.mark.parametrize("ratio", [[1, 3], [7, 11, 13], [99_999, 1], [1] * 40])
def test_bounds_of_one_give_what_was_given(ratio: list[int]) -> None:
    b = whole(ratio)
    a = [0.0] * (len(b) - 1) + [1.0]
    assert between(a, b, 1.0, 1.0) == b
    assert [x * sum(ratio) for x in b] == [r * sum(b) for r in ratio]
