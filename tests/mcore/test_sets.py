"""Every set, block kind, norm rule and alpha on two ranks equals the oracle's."""

import pytest

from ._data import Layout
from ._layouts import check
from ._pairs import pairs
from ._problem import Problem

TWO_RANKS = Layout(dp=2, distributed_optimizer=True)


@pairs(
    ("topk", "greedy", "filter", "capped", "hull", "cone", "span", "ball", "halfspace"),
    ("model", "layer", "matrix"),
)
def test_set_and_blocks(first: str, second: str) -> None:
    check(TWO_RANKS, Problem(set=first, blocks=second, alpha=0.0), atol=5e-5)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(set="mean", alpha=0.3),
        Problem(set="target"),
        Problem(norm="none", ridge=0.0),
        Problem(norm="target", blocks="layer"),
        Problem(alpha=1.0),
        Problem(beta=0.4),
        Problem(beta=0.4, norm="target", blocks="layer", set="halfspace"),
        Problem(beta=1.0, norm="none", gram="sketch"),
        Problem(set="topk", fraction=0.25, norm="none", alpha=0.5),
        Problem(set="filter", fraction=1.0, norm="none"),
        Problem(set="greedy", step_length=0.2, alpha=0.0, blocks="layer"),
        Problem(set="ball", radius=0.01, ridge=0.1),
        Problem(set="halfspace", norm="target", alpha=0.3),
        Problem(alpha=0.4, alpha_style="linear", end_alpha=0.1, alpha_steps=2),
        Problem(
            alpha=0.0,
            alpha_style="cosine",
            end_alpha=0.6,
            alpha_steps=3,
            gram="sketch",
            blocks="layer",
        ),  # fmt: skip
    ],
    ids=str,
)
def test_dials(problem: Problem) -> None:
    # a short gradient (no norm) meets Adam's epsilon, which enlarges float32's rounding
    check(TWO_RANKS, problem, atol=5e-5)


def test_blocks_across_pipeline_stages_and_shards() -> None:
    layout = Layout(tp=2, pp=2, sequence_parallel=True, tied=True, per_token=True)
    check(layout, Problem(blocks="matrix", set="hull", alpha=0.0))
