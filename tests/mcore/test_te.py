"""Sample rows in Transformer Engine's layers, through a stand-in that speaks their interface."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from . import _megatron, _oracle, _samples
from ._data import Layout
from ._pairs import pairs
from ._ranks import run_ranks
from ._sample_check import MODES, STEPS, compare, expected
from ._te import in_te, refusal, spec


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_megatron, "layer_spec", spec)


# -- tests -----------------------------------------------------------------------------------------
LAYOUTS = {
    "one": Layout(fused_gradients=True, per_token=True),
    "biases": Layout(fused_gradients=True, layer_norm=True),
    "TP 2": Layout(fused_gradients=True, tp=2, per_token=True),
    "biases TP 2": Layout(fused_gradients=True, tp=2, layer_norm=True, per_token=True),
    "biases TP 2 SP": Layout(fused_gradients=True, tp=2, layer_norm=True, sequence_parallel=True),
    "recompute TP 2 SP": Layout(
        fused_gradients=True, tp=2, sequence_parallel=True, recompute=True, per_token=True
    ),
    "PP 2": Layout(fused_gradients=True, pp=2),
    "DP 2 overlap biases": Layout(
        fused_gradients=True, dp=2, overlap=True, distributed_optimizer=True, layer_norm=True
    ),
    "experts TP 2 SP": Layout(
        fused_gradients=True, tp=2, etp=2, sequence_parallel=True, moe=True, per_token=True
    ),
}


@pairs(LAYOUTS, ("cone ghost", "model two passes"))
def test_equals_oracle(first: str, second: str) -> None:
    where, case = LAYOUTS[first], MODES[second]
    initial = in_te(_oracle.initial(where), where)
    ranks = run_ranks(where.world, _samples.train, where, case, STEPS, initial)
    parameters, log = expected(replace(where.alone, dp=where.dp), case)
    compare(ranks, in_te(parameters, where), log, case)


FUSED = Layout(fused_gradients=True)


@pytest.mark.parametrize(
    ("layout", "changes", "frozen", "message"),
    [
        (FUSED, {"fp8": "hybrid"}, "", "drop --fp8-format"),
        (FUSED, {"tp_comm_overlap": True}, "", "drop --tp-comm-overlap"),
        (Layout(), {}, "", "drop --no-gradient-accumulation-fusion"),
        (FUSED, {}, "linear_qkv.weight", "freeze the norm too"),
    ],
)
def test_refused(layout: Layout, changes: dict[str, Any], frozen: str, message: str) -> None:
    (said,) = run_ranks(1, refusal, layout, changes, frozen)
    assert message in said


# What `te.py` relies on, in the words of TE's sources.
CONTRACT = {
    "module/linear.py": (
        "wgrad_store = self.wgrad_store if self.wgrad_store.delay_wgrad_compute() else None",
        ".wgrad_store.put([inputmat_total, grad_output], wgrad_gemm)",
        "class Linear(TransformerEngineBaseModule)",
        "self.fuse_wgrad_accumulation = fuse_wgrad_accumulation",
        "self.gemm_bias_unfused_add = True",
        "grad_added_to_main_grad = True",
    ),
    "module/layernorm_linear.py": (
        "ctx.wgrad_store is not None and ctx.wgrad_store.delay_wgrad_compute()",
        "ctx.wgrad_store.put([ln_out_total, grad_output], wgrad_gemm)",
        "class LayerNormLinear(TransformerEngineBaseModule)",
        "self.zero_centered_gamma = zero_centered_gamma",
        '"layer_norm_weight"',
        '"layer_norm_bias"',
        "grad_added_to_main_grad = True",
    ),
    "module/grouped_linear.py": (
        "ctx.wgrad_store.put([inputmats, grad_output, wgrad_list], grouped_gemm_wgrad)",
        "class GroupedLinear(TransformerEngineBaseModule)",
        "self.num_gemms = num_gemms",
        'f"weight{i}"',
        "grad_added_to_main_grad = True",
    ),
    "module/base.py": ("grad_output = grad_output.reshape((-1, grad_output.shape[-1]))",),
}


@pytest.mark.parametrize("file", CONTRACT)
def test_sources_of_transformer_engine(file: str) -> None:
    found = importlib.util.find_spec("transformer_engine")
    if found is None or not found.submodule_search_locations:
        pytest.skip("Transformer Engine is not installed")
    text = (Path(found.submodule_search_locations[0]) / "pytorch" / file).read_text()
    for words in CONTRACT[file]:
        assert words in text, f"{file} has changed: {words}"
