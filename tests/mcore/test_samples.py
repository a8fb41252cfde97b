"""The layer path equals a loop over samples in plain PyTorch, in every layout and mode."""

import pytest

from . import _megatron, _oracle, _samples
from ._data import Layout
from ._ranks import run_ranks
from ._samples import Case

STEPS = 3
ONE = Layout(per_token=True)


def check(layout: Layout, case: Case, atol: float = 2e-4) -> None:
    ranks = run_ranks(layout.world, _samples.train, layout, case, STEPS, _oracle.initial(layout))
    together = _megatron.whole([pieces for pieces, _ in ranks])
    parameters = _samples.oracle(layout, case, STEPS)
    assert together.keys() == parameters.keys()
    for name, value in parameters.items():
        error = float((together[name].double() - value.reshape(-1)).abs().max())
        assert error < atol, f"{name}: {error:.2e}"


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
    "filter": Case(set="filter", fraction=1.0, alpha=0.0),
    "mean with alpha": Case(set="mean"),
    "target": Case(set="target", norm="none"),
    "halfspace merged": Case(set="halfspace", norm="none", target_pass="merged"),
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per_token", (True, False), ids=("tokens", "microbatches"))
def test_mode(mode: str, per_token: bool) -> None:
    check(Layout(per_token=per_token), MODES[mode])


LAYOUTS = {
    "TP 2": Layout(tp=2, per_token=True),
    "TP 2 SP": Layout(tp=2, sequence_parallel=True),
    "PP 2": Layout(pp=2, per_token=True),
    "PP 2 VPP 2": Layout(pp=2, vpp=2),
    "DP 2": Layout(dp=2, per_token=True),
    "DP 2 means": Layout(dp=2),
    "DP 2 sharded overlap": Layout(
        dp=2, distributed_optimizer=True, overlap=True, overlap_param_gather=True, per_token=True
    ),
    "CP 2": Layout(cp=2, per_token=True),
    "TP 2 PP 2 tied SP": Layout(tp=2, pp=2, tied=True, sequence_parallel=True, per_token=True),
    "TP 2 DP 2 SP sharded": Layout(tp=2, dp=2, sequence_parallel=True, distributed_optimizer=True),
    "tied": Layout(tied=True),
    "biases": Layout(layer_norm=True, per_token=True),
    "biases TP 2 SP": Layout(layer_norm=True, tp=2, sequence_parallel=True),
    "recompute TP 2 SP": Layout(recompute=True, tp=2, sequence_parallel=True, per_token=True),
    "q/k norms TP 2": Layout(qk_layernorm=True, tp=2, per_token=True),
    "fused": Layout(fused_gradients=True, tp=2, per_token=True),
}
LAYOUT_MODES = ("exact", "ghost", "cone sketched merged", "model two passes", "step cone")


@pytest.mark.parametrize("mode", LAYOUT_MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str, mode: str) -> None:
    case = MODES[mode]
    if LAYOUTS[layout].tied and LAYOUTS[layout].pp > 1 and case.score == "ghost":
        case = MODES["exact"]  # refused
    check(LAYOUTS[layout], case)
