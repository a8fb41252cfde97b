"""Sample rows in Transformer Engine's grouped experts, through a stand-in (`_te.py`)."""

from dataclasses import replace
from typing import Any

import pytest

from . import _layouts, _megatron, _oracle, _samples
from ._data import Layout
from ._pairs import some
from ._problem import Problem
from ._ranks import run_ranks
from ._sample_check import MODES, STEPS, compare, expected
from ._sample_oracle import Oracle, WideOracle
from ._te import grouped_spec, in_groups, refusal


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_megatron, "layer_spec", grouped_spec)


ONE = Layout(fused_gradients=True, moe=True, per_token=True)
SHARDED = Layout(
    fused_gradients=True, moe=True, tp=2, etp=2, sequence_parallel=True, recompute=True
)
SPREAD = Layout(fused_gradients=True, moe=True, ep=2, dp=2, distributed_optimizer=True)
CASES = {
    "one": (ONE, "cone ghost"),
    "one, two passes": (ONE, "model two passes"),
    "one, step": (ONE, "step ghost"),
    "TP 2 SP ETP 2 recompute": (SHARDED, "model two passes"),
    "TP 2 SP ETP 2 recompute, in the backward": (SHARDED, "cone ghost"),
    "EP 2 DP 2": (SPREAD, "cone ghost"),
}


@pytest.mark.parametrize(
    ("layout", "mode"), some(CASES, "one", "TP 2 SP ETP 2 recompute", "EP 2 DP 2")
)
def test_equals_oracle(layout: Layout, mode: str) -> None:
    case, kind = MODES[mode], WideOracle if layout.ep > 1 else Oracle
    initial = in_groups(_oracle.initial(layout), layout)
    ranks = run_ranks(layout.world, _samples.train, layout, case, STEPS, initial)
    where = layout if kind is WideOracle else replace(layout.alone, dp=layout.dp)
    parameters, log = expected(where, case, kind)
    compare(ranks, in_groups(parameters, layout), log, case)


def test_buffer_rows_in_grouped_experts() -> None:
    """They are in gradient buffers, whatever layer adds to them: each slot of a rank its own."""
    layout, problem = Layout(fused_gradients=True, moe=True), Problem(gram="exact")
    initial = in_groups(_oracle.initial(layout), layout)
    (found,) = run_ranks(1, _layouts.run, layout, problem, initial, {})
    together = _megatron.whole([found[0]])
    for name, value in in_groups(_layouts.expected(layout.alone, problem)[0], layout).items():
        error = float((together[name].double() - value.reshape(-1)).abs().max())
        assert error <= 2e-5, f"{name}: {error}"


@pytest.mark.parametrize(
    ("changes", "frozen", "message"),
    [
        ({"single_grouped_weight": True}, "", "drop --moe-single-grouped-weight"),
        ({"use_grouped_tensor": True}, "", "unset NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM"),
        ({"fused": True}, "", "drop --use-transformer-engine-op-fuser"),
        ({"fuse_wgrad_accumulation": False}, "", "drop --no-gradient-accumulation-fusion"),
        ({}, "linear_fc2.weight1", "freeze all of a layer's, or none"),
    ],
)
def test_refused(changes: dict[str, Any], frozen: str, message: str) -> None:
    of_config = {"use_transformer_engine_op_fuser": "fused" in changes}
    (said,) = run_ranks(1, refusal, ONE, of_config, frozen, changes)
    assert message in said
