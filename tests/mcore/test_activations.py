"""The plan's activations are what real forwards keep; `benchmarks/plan.py` shows more layouts."""

from typing import Any

import pytest

from megatron_dr.plan import activations
from megatron_dr.plan.activations import Kept, Recompute, Shape
from megatron_dr.plan.buffers import stages

from . import _counted, _saved
from ._data import LENGTH, Layout

BF16 = dict(bf16=True, distributed_optimizer=True)
FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
CASES: dict[str, tuple[Layout, Recompute, dict[str, Any]]] = {
    "bf16": (Layout(**BF16), Recompute(), {}),
    "fp32": (Layout(), Recompute(), {}),
    "LayerNorm, biases": (Layout(layer_norm=True, **BF16), Recompute(), {}),
    "q and k norms": (Layout(qk_layernorm=True, bf16=True), Recompute(), {}),
    "dropout": (  # in attention torch keeps its probabilities, Transformer Engine a seed
        Layout(dropout=0.1, bf16=True), Recompute(), {"attention_dropout": 0.0}),
    "full": (Layout(bf16=True), Recompute("full"), FULL),
    "full, 2 layers at a time": (
        Layout(bf16=True), Recompute("full", layers=2), FULL | {"recompute_num_layers": 2}),
    "full, 3 of 4": (
        Layout(bf16=True), Recompute("full", layers=3, block=True),
        FULL | {"recompute_num_layers": 3, "recompute_method": "block"}),
    "selective": (Layout(bf16=True), Recompute("selective"), {
        "recompute_granularity": "selective", "recompute_modules": ["core_attn"]}),
    "selective, mlp too": (Layout(bf16=True), Recompute("selective", ("core_attn", "mlp")), {
        "recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}),
    "MoE": (Layout(moe=True, bf16=True), Recompute(), {}),
    "tp2": (Layout(tp=2, bf16=True), Recompute(), {}),
    "tp2, sequences split": (Layout(tp=2, sequence_parallel=True, bf16=True), Recompute(), {}),
    "cp2": (Layout(cp=2, bf16=True), Recompute(), {}),
    "tp2 cp2": (Layout(tp=2, cp=2, sequence_parallel=True, bf16=True), Recompute(), {}),
    "pp2": (Layout(pp=2, bf16=True), Recompute(), {}),
    "pp4": (Layout(pp=4, bf16=True), Recompute(), {}),
    "pp2 vpp2": (Layout(pp=2, vpp=2, bf16=True), Recompute(), {}),
    "pp2, full": (Layout(pp=2, bf16=True), Recompute("full"), FULL),
}  # fmt: skip


SOAK = ("tp2", "tp2 cp2", "pp4", "pp2, full")
NAMES = [pytest.param(n, marks=pytest.mark.soak) if n in SOAK else n for n in CASES]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept(name: str) -> None:
    layout, recompute, options = CASES[name]
    model, own, _ = _counted.planned(layout, None)
    kept = Kept(Shape(1, LENGTH), recompute, fused=False, dropout=layout.dropout > 0)
    ranks = _saved.most(layout, options)
    for stage in stages(model, own):
        found = [size for number, size in ranks if number == stage.number]
        said = activations.of_stage(stage, kept, layout.num_general, False)
        # the router does not deal tokens out evenly
        near = pytest.approx(sum(said.values()), rel=0.1 if layout.moe else 0.01)
        assert max(found) == near, (stage.number, said)
