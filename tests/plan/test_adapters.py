"""Memory of adapters alone, beside that of all weights."""

import dataclasses

import pytest

from megatron_dr.plan import adapters
from megatron_dr.plan.activations import Kept, Recompute, Shape
from megatron_dr.plan.hardware import H100
from megatron_dr.plan.layout import Layout
from megatron_dr.plan.model import Model
from megatron_dr.plan.report import report
from megatron_dr.plan.step import Run

LAYERS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
LLAMA = Model(32, 4096, 32, 8, 14336, 128256)
RUN = Run(LLAMA, Layout(dp=4), Kept(Shape(1, 2048), Recompute("full")), 4, 0, None)


def test_elements() -> None:
    """Of docs/lora.md: r (6 h + 2 h_kv + 3 f) a layer, 35.7 million for 8B and rank 16."""
    whole = adapters.elements(RUN, 16, LAYERS)
    assert whole == 32 * 16 * (6 * 4096 + 2 * 1024 + 3 * 14336) == pytest.approx(35.7e6, rel=1e-2)
    split = dataclasses.replace(RUN, layout=Layout(tp=2, pp=2))
    assert adapters.elements(split, 16, LAYERS) == whole / 4
    assert adapters.elements(RUN, 16, LAYERS[:2]) < whole / 2


def test_what_is_trained_shrinks_and_the_rest_stays() -> None:
    plain = report(RUN, H100, [])["memory"]["stages"][0]
    found = adapters.report_of(RUN, H100, [], 16, LAYERS)
    own = found["memory"]["stages"][0]
    share = 35.65e6 / 8.03e9
    for part in ("gradients", "optimizer"):
        assert own[part] == pytest.approx(share * plain[part], rel=1e-2)
    assert own["activations"] == plain["activations"]
    assert own["weights"] == pytest.approx(plain["weights"] * (1 + share), rel=1e-3)
    assert found["refusal"] == "" and found["largest_micro_batch"] >= 1
    small = dataclasses.replace(H100, memory=20e9)
    assert "It does not fit: a rank needs" in adapters.report_of(
        RUN, small, [], 16, LAYERS
    )["refusal"]  # fmt: skip
