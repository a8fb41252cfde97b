"""How many steps, seeds and runs at a time: by hand."""

import pytest

from megatron_dr.compare import budget
from megatron_dr.compare.budget import EVALUATIONS, LEAST, SHARE, Measured, beside, fit, seconds

RUN = Measured(start=3.0, step=0.5, evaluation=1.0, memory=2**30)


@pytest.mark.parametrize("text, found", [("90s", 90), ("30m", 1800), ("2h", 7200), ("1.5", 90)])
def test_a_time(text: str, found: float) -> None:
    assert seconds(text) == found


@pytest.mark.parametrize("text", ["", "0m", "soon", "3d", "-1m"])
def test_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="give a time as 90s, 30m or 2h"):
        seconds(text)


def test_all_runs_fit() -> None:
    steps, seeds = fit(1800, 7, 3, 2, RUN, 10_000)
    rounds = 11  # of 21 runs, two at a time
    assert seeds == 3 and rounds * RUN.run(steps) <= SHARE * 1800 < rounds * RUN.run(steps + 1)
    assert RUN.run(100) == 3 + 50 + (EVALUATIONS + 1)


def test_fewer_seeds_before_too_few_steps() -> None:
    one = 7 * RUN.run(LEAST) / SHARE
    assert fit(2.5 * one, 7, 3, 1, RUN, 10_000)[1] == 2
    assert fit(1.01 * one, 7, 3, 1, RUN, 10_000) == (LEAST, 1)
    with pytest.raises(ValueError, match="--budget leaves .* raise it"):
        fit(0.9 * one, 7, 3, 1, RUN, 10_000)


def test_no_more_than_the_most() -> None:
    assert fit(10_000, 7, 3, 2, RUN, 80) == (80, 3)


def test_side_by_side() -> None:
    free = 10 * 2**30
    assert beside(21, 1, 8, free, 2**30) == 8
    assert beside(21, 2, 8, free, 2**30) == 4  # two ranks each
    assert beside(21, 1, 64, free, 2**30) == 8  # by memory
    assert beside(3, 1, 64, free, 2**30) == 3
    assert beside(21, 4, 2, free, 2**30) == 1  # one at least
    assert budget.LEAST < 100
