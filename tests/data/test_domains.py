"""The order of domains: shares kept at every place, any place at once, the same on every rank."""

from collections import Counter
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dr.data import domains
from megatron_dr.data.domains import DomainPlan, domains_of_step

WEIGHTS = [
    (1.0,),
    (0.7, 0.3),
    (30.0, 70.0),
    (1.0, 1.0, 1.0),
    (0.9, 0.02, 0.02, 0.02, 0.02, 0.02),
    (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0),
    (0.123, 0.456, 0.421),
]
some_weights = st.lists(st.integers(1, 60), min_size=1, max_size=8)


def order(plan: DomainPlan, units: int) -> list[int]:
    return [plan.domain(q) for q in range(units)]


def lags(plan: DomainPlan, units: int) -> np.ndarray:
    """w_d q - count_d(q) after q = 1 .. units units [units, n]."""
    chosen = np.array(order(plan, units))[:, None] == np.arange(len(plan.weights))
    q = np.arange(1, units + 1)[:, None]
    lag: np.ndarray = q * np.array(plan.weights) - chosen.cumsum(0)
    return lag


@settings(max_examples=100, deadline=None)
@given(some_weights)
def test_counts_stay_close_to_the_shares(weights: list[int]) -> None:
    n, lag = len(weights), lags(DomainPlan(weights), 700)
    assert lag.min() >= -(1 - 1 / n) - 1e-9
    assert lag.max() <= sum(1 / k for k in range(2, n + 1)) + 1e-9


@settings(max_examples=50, deadline=None)
@given(some_weights)
def test_the_one_furthest_behind_comes_next(weights: list[int]) -> None:
    plan, seen, total = DomainPlan(weights), [0] * len(weights), sum(weights)
    for q in range(300):
        behind = [w * (q + 1) - total * seen[d] for d, w in enumerate(weights)]
        assert plan.domain(q) == behind.index(max(behind))
        seen[plan.domain(q)] += 1


@pytest.mark.parametrize("weights", WEIGHTS)
def test_any_place_at_once(weights: tuple[float, ...]) -> None:
    """count_before is the count of an order that is walked through, also far beyond one period."""
    plan, seen = DomainPlan(weights), Counter[int]()
    for q in range(3000):
        assert plan.count_before(q) == seen[plan.domain(q)]
        seen[plan.domain(q)] += 1


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("far", [10**8, 10**8 + 7, 3 * 10**12 + 1])
def test_far_places(weights: tuple[float, ...], far: int) -> None:
    """Numbers within a domain go on one by one, and still agree with the shares."""
    plan, last = DomainPlan(weights), dict[int, int]()
    for q in range(far, far + 500):
        domain, number = plan.domain(q), plan.count_before(q)
        assert number == last.get(domain, number - 1) + 1
        assert abs(number - plan.weights[domain] * q) <= 2.0
        last[domain] = number
    assert len(last) == len(weights)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 40])
def test_equal_weights_are_round_robin(n: int) -> None:
    for weight in (1.0, 0.1, 1 / n, 1e-9):
        assert order(DomainPlan([weight] * n), 3 * n) == [*range(n)] * 3


@pytest.mark.parametrize("scale", [0.1, 3.0, 1e-6, 1e6])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_scale_of_the_weights_means_nothing(weights: tuple[float, ...], scale: float) -> None:
    plan, scaled = DomainPlan(weights), DomainPlan([round(w * scale, 12) for w in weights])
    assert sum(plan.weights) == pytest.approx(1.0, abs=1e-12)
    assert plan.weights == scaled.weights and order(plan, 500) == order(scaled, 500)


def test_frozen_order() -> None:
    assert order(DomainPlan([0.7, 0.3]), 10) == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]
    assert order(DomainPlan([1, 2, 1]), 8) == [1, 0, 2, 1] * 2


@pytest.mark.parametrize("weights", [(1234567, 7654321, 3), (1e-12, 1.0), (2**0.5, 3**0.5, 1.0)])
def test_long_numbers_are_rounded_and_none_is_lost(weights: tuple[float, ...]) -> None:
    plan = DomainPlan(weights)
    exact = np.array(weights) / sum(weights)
    assert np.abs(np.array(plan.weights) - exact).max() < 2 / domains.MAX_PERIOD
    seen = Counter(order(plan, 100_001))
    assert all(seen[d] >= 1 for d in range(len(weights)))


def test_five_decimals_are_exact() -> None:
    assert DomainPlan([0.12345, 0.87655]).weights == (0.12345, 0.87655)


@pytest.mark.parametrize(
    "weights", [[], [0.5, 0.0], [1.0, -1.0], [1.0, float("nan")], [float("inf"), 1.0]]
)
def test_bad_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="must be positive numbers"):
        DomainPlan(weights)


@pytest.mark.parametrize("ranks, peers", [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_steps_deal_the_order_out(ranks: int, peers: int) -> None:
    """Row groups take units side by side, peers the same one, steps go on where others ended."""
    plan, units = DomainPlan([5, 3, 1]), count()
    first = 0
    for number in (3, 1, 4):
        step = [domains_of_step(plan, first, number, r, ranks, peers) for r in range(ranks)]
        for m in range(number):
            for leader in range(0, ranks, peers):
                expected = plan.domain(next(units))
                assert {step[leader + p][m] for p in range(peers)} == {expected}
        first += number
