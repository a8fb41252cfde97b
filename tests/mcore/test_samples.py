"""The layer path equals a loop over samples in plain PyTorch, in every layout and mode."""

import pytest

from ._data import Layout
from ._pairs import pairs
from ._sample_check import MODES, check


@pairs(MODES, ("tokens", "microbatches"))
def test_mode(first: str, second: str) -> None:
    check(Layout(per_token=second == "tokens"), MODES[first])


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
# Megatron's hooks want a gradient of every backward, also of a target that is only measured
OVERLAPS = {
    "DP 2": (Layout(dp=2, distributed_optimizer=True, overlap=True, per_token=True), "no alpha"),
    "refresh": (Layout(overlap=True), "refresh"),
    "biases, tied": (Layout(overlap=True, layer_norm=True, tied=True, per_token=True), "no alpha"),
    "fused, tied": (Layout(overlap=True, fused_gradients=True, tied=True), "no alpha"),
    "experts": (Layout(overlap=True, moe=True, per_token=True), "no alpha"),
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_a_measured_target_with_overlapped_reduction(name: str) -> None:
    layout, mode = OVERLAPS[name]
    check(layout, MODES[mode])


LAYOUT_MODES = ("exact", "ghost", "cone sketched merged", "model two passes", "step cone")


@pairs(LAYOUTS, LAYOUT_MODES)
def test_layout(first: str, second: str) -> None:
    layout, case = LAYOUTS[first], MODES[second]
    if layout.tied and layout.pp > 1 and case.score == "ghost":
        case = MODES["exact"]  # refused
    check(layout, case)
