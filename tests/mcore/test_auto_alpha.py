"""The rule `auto` sees the same halves in every layout, and its alpha is the dense rows'."""

from typing import Any

import pytest
import torch

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.projection import Cone, alpha_of, smoothed, statistics

from . import _megatron, _oracle
from ._data import Layout
from ._ranks import run_ranks

SIZE = 16  # samples of the target set, of which 4 are in a step
LAYOUTS = {
    "buffers": Layout(),
    "buffers-tp2-token": Layout(tp=2, per_token=True, full_masks=True),
    "groups": Layout(dp=2),
    "groups-pp2-distopt": Layout(dp=2, pp=2, distributed_optimizer=True),
}


def alphas(layout: Layout, initial: Any) -> list[float]:
    dr = DRConfig(alpha_style="auto", target_size=SIZE, slots=layout.slots, gram="exact")
    log = _megatron.train(layout, 2, initial, lambda m, o, c: megatron_dr.attach(m, o, c, dr))[3]
    return [float(projection.alpha) for _, projection in log]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_alpha_is_the_dense_rows(layout: Layout) -> None:
    initial = _oracle.initial(layout)
    found = run_ranks(layout.world, alphas, layout, initial)
    assert all(a == found[0] for a in found)
    parameters = {k: v.double().requires_grad_() for k, v in initial.items()}
    general, target = _oracle.rows(layout, parameters, 0)
    sequences = _oracle.targets(layout, 0)
    halves = [
        _oracle._gradient(parameters, half, _oracle._tokens(half, layout))
        for half in (sequences[:2], sequences[2:])
    ]
    flat = lambda g: torch.cat([g[name].reshape(-1) for name in target])  # noqa: E731
    error = (flat(halves[0]) - flat(halves[1])) / 2
    rows = torch.stack([*(flat(g) for g in general), flat(target), error])
    gram = (rows @ rows.T)[None]
    new = statistics(Cone(0.3), "general", gram, exchangeable=True)
    expected = alpha_of(smoothed(None, new), 4 / SIZE)
    assert 0.0 <= float(expected) <= 1.0
    assert abs(found[0][0] - float(expected)) < 1e-3


def test_target_set_size_is_needed() -> None:
    def attach() -> str:
        dr = DRConfig(alpha_style="auto", slots=4)
        try:
            _megatron.train(Layout(), 1, None, lambda m, o, c: megatron_dr.attach(m, o, c, dr))
        except ValueError as error:
            return str(error)
        return ""

    assert "needs target_size" in run_ranks(1, attach)[0]
