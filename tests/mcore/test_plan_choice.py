"""The rows and the gram that the plan names are those that a run takes."""

import dataclasses
import re
from unittest import mock

import pytest

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore.buffer_rows import notes
from megatron_dr.plan import choice
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
