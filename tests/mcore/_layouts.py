"""Buffer rows on Megatron's model in a layout, beside the oracle."""

import dataclasses
import functools
from typing import Any

import pytest
import torch

import megatron_dr
from megatron_dr import DRConfig

from . import _megatron, _oracle
from ._data import Layout
from ._problem import Problem
from ._ranks import run_ranks

STEPS = 3


def config(layout: Layout, problem: Problem, **changes: Any) -> DRConfig:
    slots = layout.slots
    values = dataclasses.asdict(problem)
    if layout.domains:
        changes["rows"] = "domain"
        changes["domains"] = tuple(f"corpus {d}" for d in range(layout.domains))
    if layout.row_ranks:
        changes["row_ranks"] = layout.row_ranks
    if layout.target_ranks:
        changes["target_ranks"] = layout.target_ranks
    if layout.maximin:
        changes |= {"targets": "maximin", "target_sets": 2}
    if problem.gram == "exact":
        del values["sketch_size"]
    return DRConfig(
        **{**values, "rows": "slot" if slots > 1 else "rank", "slots": slots, **changes}
    )


def run(layout: Layout, problem: Problem, initial: Any, changes: dict[str, Any]) -> Any:
    """On a rank: train; return parameters' pieces, weights and log per step, block names."""
    dr = config(layout, problem, **changes)
    model, optimizer, cfg, log = _megatron.train(
        layout, STEPS, initial, lambda m, o, c: megatron_dr.attach(m, o, c, dr)
    )
    names = megatron_dr.mcore.attach.attached(model).rows.layout.names
    weights = [p.weights_BM.numpy() for _, p in log]
    return _megatron.pieces(model, cfg), weights, [_megatron.logged(r) for r, _ in log], names


CONE = Problem()


@functools.cache
def expected(layout: Layout, problem: Problem) -> Any:
    """The oracle's parameters, and weights and sketches' errors per step. It needs a second, and
    many layouts have the same: ask for `layout.alone`."""
    return _oracle.train(
        layout, problem, STEPS, _megatron.LEARNING_RATE, _megatron.CLIP, _megatron.EPS
    )


def check(
    layout: Layout,
    problem: Problem = CONE,
    atol: float = 2e-5,
    weights_atol: float = 2e-4,
    **changes: Any,
) -> None:
    initial = _oracle.initial(layout)
    ranks = run_ranks(layout.world, run, layout, problem, initial, changes)
    parameters, history, errors = expected(layout.alone, problem)
    for _, weights, *_ in ranks:  # the same on every rank, bit for bit
        assert all((a == b).all() for a, b in zip(weights, ranks[0][1], strict=True))
    for found in (log for _, _, log, _ in ranks if log[0] and errors):  # of last stages
        said = [values["dr sketch error"] for values in found]
        assert said == pytest.approx(errors, rel=1e-3)
    names = ranks[0][3]
    assert len(names) == len(history[0])
    weighs = problem.set not in ("mean", "target")  # these two keep no slots
    for step, wanted in enumerate(history if weighs else []):
        found = ranks[0][1][step]
        assert found.shape == (len(names), layout.domains or layout.rows)
        for number, name in enumerate(names):
            key = "" if problem.blocks == "model" else name
            torch.testing.assert_close(
                torch.from_numpy(found[number]), torch.from_numpy(wanted[key]),
                rtol=0, atol=weights_atol,
            )  # fmt: skip
    together = _megatron.whole([pieces for pieces, *_ in ranks])
    assert together.keys() == parameters.keys()
    for name, value in parameters.items():
        error = float((together[name].double() - value.reshape(-1)).abs().max())
        assert error <= atol, f"{name}: {error}"
