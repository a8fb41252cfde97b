"""What a plan proposes is said by a recipe's keys, all of which a recipe takes."""

import dataclasses

import pytest

from megatron_dr.launch.sizes import by_keys
from megatron_dr.plan import fit
from megatron_dr.plan.activations import Kept, Shape
from megatron_dr.plan.hardware import H100
from megatron_dr.plan.layout import Layout
from megatron_dr.plan.model import Model
from megatron_dr.plan.rows import Rows
from megatron_dr.plan.step import Run

from .test_recipe import read

RUN = Run(
    Model(32, 4096, 32, 8, 14336, 128256), Layout(dp=8, distributed_optimizer=False),
    Kept(Shape(2, 4096)), 8, 4, Rows(slots=2),
)  # fmt: skip
TENSOR = dataclasses.replace(RUN, layout=Layout(dp=4, tp=2))


def test_each_change_is_of_keys() -> None:
    changes = (*fit._changes(RUN), *fit._changes(TENSOR), *fit._sharded(RUN, H100))
    assert len(changes) >= 12
    for flags, _ in changes:
        said = by_keys(f"It does not fit: --x; {flags} would need 1.0 GB.", read("mistral-7b/sft"))
        start, end = "It does not fit: --x; ", " would need 1.0 GB."
        assert said.startswith(start) and said.endswith(end)
        read("mistral-7b/sft", *said.removeprefix(start).removesuffix(end).split())
        assert "--" not in said.removeprefix(start)


@pytest.mark.parametrize("name, memory, says", [
    ("mistral-7b/sft", 60e9, "; layout.tp=4 layout.sp=true would need "),
    ("mistral-7b/sft", 70e9, "; batch.micro=1 recompute=full would need "),
    ("mistral-7b/sft", 1e9, "; give a larger layout.tp or layout.pp (layout.ep for experts), or "),
    ("mistral-7b/dpo", 80e9, "; recompute=full would need "),
    ("mistral-7b/dpo", 100e9, "; give a larger layout.tp or layout.pp "),
])  # fmt: skip
def test_what_would_fit(name: str, memory: float, says: str) -> None:
    run = dataclasses.replace(RUN, layout=Layout(dp=8), rows=None)
    refusal = fit.refusal(run, dataclasses.replace(H100, memory=memory))
    assert says in by_keys(refusal, read(name)), refusal


def test_what_fits_has_no_sentence() -> None:
    assert by_keys("", read("mistral-7b/sft")) == ""
