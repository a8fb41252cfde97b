"""A run of sample rows beside its oracle: parameters, and what the log says of each step."""

import functools
from dataclasses import replace
from typing import Any

import pytest

from . import _megatron, _oracle, _samples
from ._data import Layout
from ._oracle import Parameters
from ._ranks import run_ranks
from ._sample_oracle import Oracle, oracle
from ._samples import Case

STEPS = 3

MODES = {
    "exact": Case(),
    "ghost": Case(score="ghost"),
    "sketched": Case(score="sketched"),
    "no alpha": Case(alpha=0.0),
    "merged": Case(target_pass="merged"),
    "merged ghost": Case(target_pass="merged", score="ghost"),
    "cone": Case(set="cone", norm="general"),
    "cone ghost": Case(set="cone", norm="general", score="ghost"),
    "cone sketched merged": Case(
        set="cone", norm="general", score="sketched", target_pass="merged"
    ),
    "hull": Case(set="hull", norm="none"),
    "capped": Case(set="capped", fraction=0.5, norm="target"),
    "span": Case(set="span", norm="general"),
    "ball": Case(set="ball", norm="none"),
    "greedy": Case(set="greedy"),
    "greedy second order": Case(set="greedy", step_length=0.2),
    "filter": Case(set="filter", fraction=1.0, alpha=0.0),
    "mean with alpha": Case(set="mean"),
    "target": Case(set="target", norm="none"),
    "halfspace merged": Case(set="halfspace", norm="none", target_pass="merged"),
    "beta": Case(beta=0.3),
    "beta cone step": Case(window="step", set="cone", norm="target", beta=0.3),
    "beta layer two passes": Case(blocks="layer", passes=2, norm="general", beta=1.0),
    "layer": Case(blocks="layer"),
    "model": Case(blocks="model", score="ghost"),
    "layer two passes": Case(blocks="layer", passes=2),
    "model two passes": Case(blocks="model", passes=2, set="cone", norm="general"),
    "model two passes no alpha": Case(blocks="model", passes=2, alpha=0.0, score="sketched"),
    "matrix two passes": Case(passes=2),
    "step": Case(window="step"),
    "step ghost": Case(window="step", score="ghost"),
    "step cone": Case(window="step", set="cone", norm="general", score="sketched"),
    "step two passes": Case(window="step", passes=2, score="ghost"),
    "step merged": Case(window="step", target_pass="merged", passes=2),
    "step model": Case(window="step", blocks="model", passes=2, set="hull", norm="general"),
    "streaming": Case(window="streaming"),
    "streaming ghost": Case(window="streaming", score="ghost", norm="none"),
    "refresh": Case(target_refresh=2, alpha=0.0),
    "refresh step": Case(target_refresh=3, alpha=0.0, window="step", score="ghost"),
}


def check(layout: Layout, case: Case, kind: type[Oracle] = Oracle) -> None:
    ranks = run_ranks(layout.world, _samples.train, layout, case, STEPS, _oracle.initial(layout))
    where = replace(layout.alone, dp=layout.dp) if kind is Oracle else layout
    compare(ranks, *expected(where, case, kind), case)


@functools.cache
def expected(
    layout: Layout, case: Case, kind: type[Oracle] = Oracle
) -> tuple[Parameters, list[dict[str, float]]]:
    """The oracle's parameters and log: one for the many layouts that have the same."""
    return oracle(layout, case, STEPS, kind)


def compare(
    ranks: list[Any], parameters: Parameters, log: list[dict[str, float]], case: Case
) -> None:
    """What `_samples.train` returned on each rank, against the oracle's."""
    together = _megatron.whole([pieces for pieces, _ in ranks])
    assert together.keys() == parameters.keys()
    for name, value in parameters.items():
        error = float((together[name].double() - value.reshape(-1)).abs().max())
        assert error < 2e-4, f"{name}: {error:.2e}"
    for _, found in ranks:
        if found[0]:  # a last stage
            for values, wanted in zip(found, log, strict=True):
                _compare_log(values, wanted, case)


def _compare_log(found: dict[str, float], expected: dict[str, float], case: Case) -> None:
    names = {"dr rows", "dr zero rows"}
    if case.set not in ("mean", "target", "topk", "filter"):  # or they need no products of rows
        names = set(expected)
    assert names <= found.keys()
    for name in expected.keys() & found.keys():
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name
