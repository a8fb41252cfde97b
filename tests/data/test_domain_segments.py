"""The order of domains with shares that change: `DomainPlan`'s where they don't, and its bounds."""

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dr.data.domain_segments import Segments
from megatron_dr.data.domain_shares import between
from megatron_dr.data.domains import DomainPlan

WEIGHTS = [(0.7, 0.3), (30.0, 70.0), (1.0, 1.0, 1.0), (0.123, 0.456, 0.421), (0.97, 0.02, 0.01)]
Shares = Callable[[int], tuple[int, ...]]


def walked(
    plan: Segments, start: int, units: int, length: int, shares: Shares
) -> Iterator[list[int]]:
    """[domain, count_before] of each unit, as a run sees them, which adds segments as it goes."""
    for q in range(start, start + units):
        while q >= plan.last.start:
            plan.add(length, shares(q))
        yield [plan.domain(q), plan.count_before(q)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("start, length", [(0, 1), (0, 7), (23, 64)])
def test_shares_that_stay_are_the_plans_order(
    weights: tuple[float, ...], start: int, length: int
) -> None:
    plan, segments = DomainPlan(weights), Segments(weights, start, length)
    found = walked(segments, start, 400, length, lambda _: segments.given)
    assert list(found) == [
        [plan.domain(q), plan.count_before(q)] for q in range(start, start + 400)
    ]


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=6), st.integers(1, 9), st.integers(0, 999))
def test_counts_stay_close_to_the_sum_of_the_shares(
    weights: list[int], length: int, seed: int
) -> None:
    """Also of shares too small for a unit in a segment; a domain's numbers go on one by one."""
    n, units, generator = len(weights), 200, np.random.default_rng(seed)
    segments, sums = Segments(weights, 0, length), np.zeros(n)
    counts, largest = Counter[int](), sum(1 / k for k in range(2, n + 1))

    def drawn(_: int) -> tuple[int, ...]:
        a = generator.dirichlet([0.3] * n)
        return between(a.tolist(), segments.given, 0.01, 5.0)

    for q, (domain, before) in enumerate(walked(segments, 0, units, length, drawn)):
        assert before == counts[domain]
        counts[domain] += 1
        shares = segments.at(q).shares
        sums += np.array(shares) / sum(shares)
        lag = sums - np.array([counts[d] for d in range(n)])
        assert lag.min() >= -(1 - 1 / n) - 1e-6 and lag.max() <= largest + 1e-6


def other(_: int) -> tuple[int, ...]:
    given_shares = Segments((1, 2, 1), 0, 1).given
    return between((0.1, 0.2, 0.7), given_shares, 0.1, 3.0)


@pytest.mark.parametrize("at", [0, 5, 10, 11, 24, 29, 30])
def test_a_state_goes_on_where_it_was(at: int) -> None:
    """Within a segment and between two."""
    one = Segments((1, 2, 1), 0, 10)
    list(walked(one, 0, at, 10, other))
    resumed = Segments((1, 2, 1), at, 10)
    resumed.load(one.state(unit_size=3), 3)
    assert [one.read(q, 4) for q in range(at, at + 6)] == [
        {one.domain(p) for p in range(q, q + 4)} for q in range(at, at + 6)
    ]
    found = list(walked(resumed, at, 60, 10, other))
    assert found == list(walked(one, at, 60, 10, other))


def test_units_of_another_size_go_on_after_what_was_read() -> None:
    one = Segments((1, 1), 0, 12)
    list(walked(one, 0, 12, 12, lambda _: one.given))
    resumed = Segments((1, 1), 6, 6)
    resumed.load(one.state(unit_size=2), 4)
    found = walked(resumed, 6, 6, 6, lambda _: one.given)  # 24 samples later, in units of 4
    assert sorted(map(tuple, found)) == [(d, n) for d in (0, 1) for n in (3, 4, 5)]
    with pytest.raises(ValueError, match="not a multiple of 5, --micro-batch-size x the ranks"):
        resumed.load(one.state(unit_size=2), 5)


def test_what_is_not_decided_is_not_read() -> None:
    segments = Segments((1, 1), 0, 10)
    assert segments.domain(19) == 1
    with pytest.raises(RuntimeError, match="unit 20 was asked for before it was decided"):
        segments.domain(20)


def test_a_fork_sees_what_is_decided_after_it_began() -> None:
    segments = Segments((1, 1), 0, 10)
    fork = multiprocessing.get_context("fork")
    asked, said = fork.Queue(), fork.Queue()

    def work() -> None:
        for q in iter(asked.get, None):
            said.put([segments.domain(q), segments.count_before(q)])

    worker = fork.Process(target=work)
    worker.start()
    try:
        for round_number in range(6):  # more than are kept
            segments.add(10, segments.given[::-1] if round_number % 2 else (2**39, 2**39))
            q = segments.last.start + 3
            asked.put(q)
            assert said.get(timeout=20) == [segments.domain(q), segments.count_before(q)]
    finally:
        asked.put(None)
        worker.join(20)
