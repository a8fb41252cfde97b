"""Memory of adapters alone, beside that of all weights."""

import dataclasses

import pytest

from megatron_dr.plan import adapters
from megatron_dr.plan.activations import Kept, Recompute, Shape
from megatron_dr.plan.asked import Asked, settle
from megatron_dr.plan.choice import Wanted
from megatron_dr.plan.hardware import H100
from megatron_dr.plan.layout import Layout
from megatron_dr.plan.model import Model
from megatron_dr.plan.report import report
from megatron_dr.plan.rows import Rows
from megatron_dr.plan.step import Run

LAYERS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
LLAMA = Model(32, 4096, 32, 8, 14336, 128256)
RUN = Run(LLAMA, Layout(dp=4), Kept(Shape(1, 2048), Recompute("full")), 4, 0, None)


def test_elements() -> None:
    """Of docs/lora.md: r (6 h + 2 h_kv + 3 f) a layer, 35.7 million for 8B and rank 16."""
    whole = adapters.elements(LLAMA, RUN.layout, 16, LAYERS)
    assert whole == 32 * 16 * (6 * 4096 + 2 * 1024 + 3 * 14336) == pytest.approx(35.7e6, rel=1e-2)
    assert adapters.elements(LLAMA, Layout(tp=2, pp=2), 16, LAYERS) == whole / 4
    assert adapters.elements(LLAMA, RUN.layout, 16, LAYERS[:2]) < whole / 2


def test_slots_are_of_adapters() -> None:
    """A slot of all weights does not fit beside 8B on 4 ranks; the adapters' are 143 MB."""
    ask = Asked(LLAMA, Layout(dp=4), RUN.kept, 64, 8, Wanted(Rows(halves=True)))
    run, (rows, _) = settle(ask, H100)
    assert run.rows is not None and run.rows.slots == 1
    assert "memory allows no more slots, where 4 would make 16 rows: raise --dr-memory" in rows
    run, (rows, _) = settle(adapters.alone(ask, 16, LAYERS), H100)
    assert rows == "rows auto: 4 rows of 1 rank, 4 slots on each (up to 16 rows)"


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
