"""Sketched grams do not depend on the layout, and are grams of the sketched dense rows."""

from typing import Any

import numpy as np
import torch

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.projection import CountSketch, key_of

from . import _megatron, _oracle
from ._data import Layout
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
    dr = DRConfig(
        rows="slot", slots=layout.slots, gram="sketch", sketch_size=SIZE, seed=SEED
    )
    log = _megatron.train(layout, 1, initial, lambda m, o, c: megatron_dr.attach(m, o, c, dr))[3]
    gram: np.ndarray = log[0][1].gram_BRR.numpy()[0]
    return gram


def test_sketched_gram_is_the_same_in_every_layout() -> None:
    initial = _oracle.initial(LAYOUTS[0])
    parameters = {k: v.double().requires_grad_() for k, v in initial.items()}
    general, target = _oracle.rows(LAYOUTS[0], parameters, 0)
    sketch = CountSketch(SIZE, SEED * 1_000_003)
    out = torch.zeros(len(general) + 1, SIZE)
    for name in target:
        values = torch.stack([g[name].reshape(-1).float() for g in [*general, target]])
        sketch.add_(out, values, torch.arange(values.shape[1]), key_of(name))
    dense = (out.double() @ out.double().T).numpy()
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
