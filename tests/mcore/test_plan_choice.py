"""The rows and the gram that the plan names are those that a run takes."""

import dataclasses
import re
from unittest import mock

import pytest

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore import attach, compat
from megatron_dr.mcore.buffer_rows import notes, row_choice
from megatron_dr.plan import choice, memory
from megatron_dr.plan.buffers import stages
from megatron_dr.plan.choice import Wanted
from megatron_dr.plan.hardware import H100
from megatron_dr.projection import size_for

from . import _counted, _megatron
from ._data import Layout
from ._ranks import run_ranks

BF16 = dict(bf16=True, distributed_optimizer=True)
CASES = {
    "dp2": Layout(dp=2, **BF16),
    "dp2, overlap": Layout(dp=2, overlap=True, **BF16),
    "pp2 dp2, overlap": Layout(pp=2, dp=2, overlap=True, **BF16),
}


def _said(layout: Layout) -> list[str]:
    """What a rank says when the plugin is attached."""
    said: list[str] = []
    _megatron.initialize(layout)
    model, optimizer, config = _megatron.build(layout)
    with mock.patch.object(notes, "say", said.append):
        handle = megatron_dr.attach(model, optimizer, config, DRConfig(rows="rank"))
    handle.detach()
    return said


def _rows_said(free: float) -> list[str]:
    """The same, where a rank has so many bytes free and 8 microbatches."""
    layout, dr = Layout(dp=2, **BF16), DRConfig(rows="auto")
    _megatron.initialize(layout)
    model, optimizer, config = _megatron.build(layout)
    said: list[str] = []
    with (
        mock.patch.object(attach, "say", said.append),
        mock.patch.object(row_choice, "free_bytes", lambda _: free),
        mock.patch.object(compat, "num_microbatches", lambda: 8),
    ):
        megatron_dr.attach(model, optimizer, config, dr).detach()
    return said


@pytest.mark.parametrize("slots", [1, 4, 8])
def test_rows(slots: int) -> None:
    """Memory for half a buffer more than the target and so many slots of 4 bytes an element."""
    model, own, rows = _counted.planned(Layout(dp=2, **BF16), DRConfig())
    (stage,) = stages(model, own)
    elements = sum(b.numel for b in stage.buffers)
    free = 4 * elements * (slots + 0.5) / DRConfig().memory
    kept = sum(memory.plain(stage).values()) - 8 * memory.owned(stage)
    roomy = dataclasses.replace(H100, memory=kept + free, reserved=0.0)
    chosen, (mine, _) = choice.settle(Wanted(rows), (stage,), roomy, 8)
    assert chosen.slots == slots
    (line,) = (said for said in run_ranks(2, _rows_said, free)[0] if said.startswith("rows auto"))
    assert re.sub(r", [\d,]+ bytes", "", line) == mine


@pytest.mark.parametrize("name", CASES)
def test_gram(name: str) -> None:
    layout = CASES[name]
    said = next(line for line in run_ranks(layout.world, _said, layout)[0] if " gram (" in line)
    sizes = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) bytes inside", said)]
    between = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) between nodes", said)]
    dr = DRConfig(rows="rank")
    model, own, rows = _counted.planned(layout, dr)
    held = stages(model, own)
    rows = dataclasses.replace(
        rows, sketch=size_for(dr.wanted_error, rows.of(own).vectors), blocks=1
    )
    for kind, found in zip((True, False), zip(sizes, between, strict=True), strict=True):
        mine = max(sum(choice.exposed(stage, rows, kind, 8)) for stage in held)
        assert mine == pytest.approx(sum(found), rel=0.02, abs=400), (kind, said)
    chosen, (why,) = choice.settle(
        Wanted(rows, auto=False, sketch_size=lambda n: size_for(dr.wanted_error, n)), held, H100, 2
    )
    assert f"gram auto: {said.split()[0]} (" in why
    assert chosen.exact == said.startswith("exact")
