"""Sketched grams do not depend on the layout, and are grams of the sketched dense rows.

That a step's log has the oracle's estimate of their error says `test_layouts`.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch

import megatron_dr
from megatron_dr import DRConfig

from . import _megatron, _oracle, _problem
from ._data import Layout
from ._problem import Problem
from ._ranks import run_ranks

SIZE, SEED = 256, 3
LAYOUTS = [
    Layout(tied=True),
    Layout(dp=2, tied=True),
    Layout(tp=2, tied=True),
    Layout(tp=2, sequence_parallel=True, tied=True),
    Layout(pp=2, tied=True),
    Layout(pp=2, vpp=2, tied=True),
    Layout(tp=2, pp=2, sequence_parallel=True, tied=True),
]


def first_gram(layout: Layout, initial: Any) -> np.ndarray:
    dr = DRConfig(rows="slot", slots=layout.slots, gram="sketch", sketch_size=SIZE, seed=SEED)
    log = _megatron.train(layout, 1, initial, lambda m, o, c: megatron_dr.attach(m, o, c, dr))[3]
    gram: np.ndarray = log[0][1].gram_BRR.numpy()[0]
    return gram


@pytest.mark.soak
def test_sketched_gram_is_the_same_in_every_layout() -> None:
    initial = _oracle.initial(LAYOUTS[0])
    parameters = {k: v.double().requires_grad_() for k, v in initial.items()}
    general, target = _oracle.rows(LAYOUTS[0], parameters, 0)
    seen = _problem.sketched(Problem(sketch_size=SIZE, seed=SEED), [*general, target], 0)
    dense = seen @ seen.T
    for layout in LAYOUTS:
        gram = run_ranks(layout.world, first_gram, layout, initial)[0]
        units = layout.dp * layout.num_general / (layout.num_general + layout.num_target)
        expected = dense * units**2
        np.testing.assert_allclose(gram, expected, rtol=0, atol=1e-5 * np.trace(expected))


def test_every_step_has_its_own_sketch() -> None:
    dr = DRConfig(rows="slot", slots=4, gram="sketch", sketch_size=SIZE)
    layout = Layout()

    def two_steps() -> list[np.ndarray]:
        log = _megatron.train(layout, 2, None, lambda m, o, c: megatron_dr.attach(m, o, c, dr))[3]
        return [p.gram_BRR.numpy() for _, p in log]

    first, second = run_ranks(1, two_steps)[0]
    assert not np.allclose(first, second)


def test_the_error_that_the_log_estimates_is_the_true_ones_size() -> None:
    """Over steps, each with a sketch of its own, of one step's rows."""
    problem = Problem(gram="sketch", blocks="layer")
    p = {k: v.double().requires_grad_() for k, v in _oracle.initial(LAYOUTS[0]).items()}
    general, target = _oracle.rows(LAYOUTS[0], p, 0)
    steps, error_sq, length_sq = range(30), 0.0, 0.0
    for members in _problem.blocks(problem.blocks, target).values():
        rows = [{n: g[n] for n in members} for g in [*general, target]]
        dense = torch.stack([torch.cat([v.reshape(-1) for v in row.values()]) for row in rows])
        gram = (dense @ dense.T).numpy()
        length_sq += np.sum(gram**2)
        for step in steps:
            seen = _problem.sketched(problem, rows, step)
            error_sq += np.sum((seen @ seen.T - gram) ** 2) / len(steps)
    estimates = [_problem.sketch_error(problem, general, target, step) for step in steps]
    assert estimates == pytest.approx([math.sqrt(error_sq / length_sq)] * len(steps), rel=0.15)
