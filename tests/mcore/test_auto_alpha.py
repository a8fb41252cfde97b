"""The rule `auto` gathers what dense rows and halves say, in every layout."""

from typing import Any

import pytest
import torch

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore.step.alpha import Alpha
from megatron_dr.projection import Cone, alpha_of, smoothed, statistics

from . import _megatron, _oracle
from ._data import Layout
from ._ranks import run_ranks

SIZE = 16  # samples of the target set, of which 4 are in a step
STEPS = 4  # of the run: 1 pass
LAYOUTS = {
    "buffers": Layout(),
    "buffers-tp2-token": Layout(tp=2, per_token=True, full_masks=True),
    "buffers-token-other-numbers": Layout(per_token=True),
    "groups": Layout(dp=2),
    "groups-instances": Layout(dp=2, distributed_optimizer=True, instances=2),
    "groups-pp2-distopt": Layout(dp=2, pp=2, distributed_optimizer=True),
}
LOSS_SCALE = 1024.0


def found(layout: Layout, initial: Any) -> tuple[float, list[float]]:
    """alpha of the first step, and the statistics that it gathered."""
    dr = DRConfig(
        alpha_style="auto", target_size=SIZE, alpha_steps=STEPS, slots=layout.slots, gram="exact"
    )
    handles: list[Any] = []

    def attach(model: Any, optimizer: Any, config: Any) -> Any:
        config.grad_scale_func = lambda loss: LOSS_SCALE * loss  # as with fp16
        handles.append(megatron_dr.attach(model, optimizer, config, dr))
        return handles[0]

    log = _megatron.train(layout, 1, initial, attach)[3]
    return float(log[0][1].alpha), handles[0].state_dict()["dial"]["statistics"].tolist()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_alpha_is_the_dense_rows(layout: Layout) -> None:
    """What a checkpoint keeps is of mean gradients, whatever Megatron divides and multiplies by."""
    initial = _oracle.initial(layout)
    each = run_ranks(layout.world, found, layout, initial)
    assert all(one == each[0] for one in each)
    parameters = {k: v.double().requires_grad_() for k, v in initial.items()}
    general, target = _oracle.rows(layout, parameters, 0)
    sequences = _oracle.targets(layout, 0)
    tokens = _oracle._tokens(sequences, layout)  # a half has its tokens' part in t, doubled
    halves = [
        _oracle._gradient(parameters, half, None if tokens is None else tokens / 2)
        for half in (sequences[:2], sequences[2:])
    ]
    flat = lambda g: torch.cat([g[name].reshape(-1) for name in target])  # noqa: E731
    error = (flat(halves[0]) - flat(halves[1])) / 2
    rows = torch.stack([*(flat(g) for g in general), flat(target), error])
    gram = (rows @ rows.T)[None]
    expected = smoothed(None, statistics(Cone(0.3), "general", gram))
    alpha, gathered = each[0]
    got = torch.tensor(gathered, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.norm()))
    assert alpha == pytest.approx(float(alpha_of(expected, STEPS * 4 / SIZE)), abs=1e-3)


def test_target_set_size_is_needed() -> None:
    def attach() -> str:
        dr = DRConfig(alpha_style="auto", alpha_steps=STEPS, slots=4)
        try:
            _megatron.train(Layout(), 1, None, lambda m, o, c: megatron_dr.attach(m, o, c, dr))
        except ValueError as error:
            return str(error)
        return ""

    assert "needs target_size" in run_ranks(1, attach)[0]


def test_what_an_older_version_kept_is_brought_to_the_unit() -> None:
    """Its factor went with layout and tokens; without one, the first step would not count."""
    dr = DRConfig(alpha_style="auto", target_size=SIZE, alpha_steps=STEPS, slots=4)
    gram = torch.eye(4, dtype=torch.float64)[None] + 0.5
    kept, old, other = (Alpha(dr) for _ in range(3))
    for _ in range(3):
        kept.alpha(0, 4, gram)
    assert kept.statistics is not None
    old.load(1e6 * kept.statistics)
    assert old.state is None
    other.load([0.5, 0.5])  # the thresholds of a run with another kind of rows
    assert float(old.alpha(3, 4, gram)) == pytest.approx(float(kept.alpha(3, 4, gram)))
    torch.testing.assert_close(old.statistics, kept.statistics)
    assert float(other.alpha(3, 4, gram)) == pytest.approx(float(Alpha(dr).alpha(0, 4, gram)))
