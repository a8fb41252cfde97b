"""The expected error of sample rows' sketches, in the log."""

import math
from dataclasses import replace

import pytest

from . import _oracle, _samples
from ._data import Layout
from ._ranks import run_ranks
from ._samples import Case

SKETCHED = Case(score="sketched")
CASES = {
    "microbatch": SKETCHED,
    "merged": replace(SKETCHED, target_pass="merged"),
    "layer": replace(SKETCHED, blocks="layer", set="cone", norm="general"),
    "step": replace(SKETCHED, window="step", set="cone", norm="general", blocks="model"),
}


def logged(layout: Layout, case: Case) -> list[float]:
    ranks = run_ranks(layout.world, _samples.train, layout, case, 2, _oracle.initial(layout))
    found = [[values["dr sketch error"] for values in log] for _, log in ranks if log[0]]
    assert all(errors == found[0] for errors in found)
    return found[0]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_it_does_not_depend_on_the_layout(case: Case) -> None:
    one = logged(Layout(per_token=True), case)
    two = logged(Layout(per_token=True, tp=2, sequence_parallel=True), case)
    bound = math.sqrt((1 + 2 / case.kronecker_out) * (1 + 2 / case.kronecker_in) - 1)
    assert all(0.0 < value < bound for value in one)
    assert two == pytest.approx(one, rel=1e-3)


def test_without_sketches_there_is_none() -> None:
    layout = Layout(per_token=True)
    ranks = run_ranks(1, _samples.train, layout, Case(score="exact"), 1, _oracle.initial(layout))
    assert "dr sketch error" not in ranks[0][1][0]
