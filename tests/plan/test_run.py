"""A run's plan by arithmetic: what fits, what is chosen, what is proposed."""

import dataclasses
from itertools import pairwise

import pytest

from megatron_dr.plan import activations, asked, fit, hardware, report, step, sweep
from megatron_dr.plan.activations import Kept, Recompute, Shape
from megatron_dr.plan.asked import Asked
from megatron_dr.plan.buffers import stages
from megatron_dr.plan.choice import Wanted
from megatron_dr.plan.hardware import H100
from megatron_dr.plan.layout import Layout
from megatron_dr.plan.model import Model
from megatron_dr.plan.rows import Rows
from megatron_dr.plan.schedule import one_f_one_b

LLAMA_8B = Model(32, 4096, 32, 8, 14336, 128256)
LLAMA_70B = Model(80, 8192, 64, 8, 28672, 128256)
KEPT = Kept(Shape(1, 8192))
TWO = Layout(dp=4, tp=2, sequence_parallel=True)


def wanted(layout: Layout, kept: Kept = KEPT, **rows: int) -> Asked:
    return Asked(LLAMA_8B, layout, kept, 64, 8, Wanted(Rows(halves=True, **rows)))


def test_a_run_that_does_not_fit() -> None:
    """One sentence: the largest parts first, and the change that was tried and would do."""
    run, _ = asked.settle(wanted(Layout(dp=8)), H100)
    says = fit.refusal(run, H100)
    assert says.startswith("It does not fit: a rank needs 114.7 GB of 75.0 (activations 45.7, gra")
    assert says.endswith("--tensor-model-parallel-size 2 --sequence-parallel would need 68.1 GB.")
    mended, _ = asked.settle(wanted(TWO), H100)
    assert fit.most(mended) / 1e9 == pytest.approx(68.1, abs=0.05)
    assert fit.refusal(mended, H100) == ""


def of_70b(layout: Layout, model: Model = LLAMA_70B, **rows: int) -> Asked:
    return Asked(model, layout, KEPT, 64, 64, Wanted(Rows(halves=True, **rows)))


EIGHT = Layout(dp=8, tp=8, sequence_parallel=True)


@pytest.mark.parametrize(
    "layout, says, mended",
    [
        (EIGHT, "--pipeline-model-parallel-size 2", dataclasses.replace(EIGHT, dp=4, pp=2)),
        (
            Layout(dp=64),
            "--tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 2",
            dataclasses.replace(EIGHT, dp=4, pp=2),
        ),
    ],
)
def test_pipeline_stages_are_advised(layout: Layout, says: str, mended: Layout) -> None:
    """On as many GPUs; the run of these flags needs what was said, and fits."""
    run, _ = asked.settle(of_70b(layout), H100)
    other, _ = asked.settle(of_70b(mended), H100)
    needs = fit.most(other)
    assert needs <= H100.usable and mended.world == layout.world
    assert fit.refusal(run, H100).endswith(f"; {says} would need {needs / 1e9:.1f} GB.")


@pytest.mark.parametrize(
    "layers, says",
    [
        (76, "--pipeline-model-parallel-size 4 would need"),
        (78, "--pipeline-model-parallel-size 2 --recompute-granularity full"),
        (79, "take more GPUs for a copy of the model: --sweep proposes layouts."),
    ],
)
def test_advised_stages_divide_the_layers(layers: int, says: str) -> None:
    ask = of_70b(EIGHT, dataclasses.replace(LLAMA_70B, layers=layers), slots=2)
    assert ask.wanted is not None
    slots = dataclasses.replace(ask.wanted, auto=False)
    assert says in fit.refusal(asked.settle(dataclasses.replace(ask, wanted=slots), H100)[0], H100)


def test_the_largest_microbatch_fits_and_the_next_does_not() -> None:
    run, _ = asked.settle(wanted(TWO), dataclasses.replace(H100, memory=250e9))
    large = dataclasses.replace(H100, memory=250e9)
    found = fit.largest_micro_batch(run, large)
    assert found == 2  # the target's batch is 2 of a rank
    tight = dataclasses.replace(H100, memory=fit.most(run) + H100.reserved)
    assert fit.largest_micro_batch(run, tight) == 1
    assert fit.largest_micro_batch(run, dataclasses.replace(H100, memory=10e9)) == 0


def test_slots_as_memory_allows() -> None:
    """8B on 4 ranks: 4 rows; 16 GB a slot beyond the first."""
    ask = wanted(TWO)
    run, (rows, _) = asked.settle(ask, H100)
    assert run.rows is not None and run.rows.slots == 1 and "memory allows no more" in rows
    large, (rows, _) = asked.settle(ask, dataclasses.replace(H100, memory=2e12))
    assert large.rows is not None and large.rows.slots == 4
    assert rows == "rows auto: 4 rows of 1 rank, 4 slots on each (up to 16 rows)"


@pytest.mark.parametrize("stage, expected", [(0, 4), (1, 3), (3, 1)])
def test_microbatches_in_flight(stage: int, expected: int) -> None:
    layout = Layout(pp=4)
    assert activations.in_flight(stages(LLAMA_8B, layout)[stage], 8) == expected
    assert activations.in_flight(stages(LLAMA_8B, layout)[stage], 2) == min(2, expected)


def test_full_recompute_keeps_the_inputs() -> None:
    """Of 32 layers, and one layer or the loss."""
    (stage,) = stages(LLAMA_8B, Layout())
    kept = Kept(Shape(1, 8192), Recompute("full"))
    parts = activations.of_stage(stage, kept, 8)
    assert parts["layers"] == 32 * 8192 * 4096 * 2 + 8 * 8192
    assert parts["beside"] > 6 * 8192 * 128256  # the logits, and their softmax


def test_a_step_with_a_target_takes_longer() -> None:
    """By its microbatches, and by what is exposed."""
    run, _ = asked.settle(wanted(TWO), H100)
    plain, ours = step.seconds(asked.plain_of(run), H100), step.seconds(run, H100)
    assert ours["computation"] == pytest.approx(plain["computation"] * 18 / 16)
    assert ours["solve"] > 0 and "solve" not in plain
    assert run.operations()["target"] == pytest.approx(run.operations()["general"] / 8)


def test_report_adds_up() -> None:
    run, said = asked.settle(wanted(TWO), H100)
    numbers = report.report(run, H100, said)
    assert numbers["memory"]["most"] == sum(numbers["memory"]["stages"][0].values())
    assert numbers["rows"]["rows"] == 4 and numbers["layout"]["gpus"] == 8
    assert numbers["chosen"] == said and numbers["refusal"] == ""


def test_sweep() -> None:
    """What is proposed fits, is on all GPUs, and is sorted; the flags say it."""
    found = sweep.proposals(wanted(Layout()), 16, H100)
    seconds = [one.seconds for one in found]
    assert all(one <= 1.005 * later for one, later in pairwise(seconds))
    for one in found:
        assert one.run.layout.world == 16 and one.memory <= H100.usable
        assert fit.most(one.run) == one.memory
    assert report.flags_of(found[0].run).endswith("--micro-batch-size 1")
    assert sweep.proposals(wanted(Layout()), 16, dataclasses.replace(H100, memory=6e9)) == []


def test_of_layouts_as_fast_the_one_split_least_comes_first() -> None:
    """TP 2 with 1, 2 and 4 context ranks: 0.03% between them."""
    ask = dataclasses.replace(wanted(Layout()), target_batch=64)
    first = [one.run.layout for one in sweep.proposals(ask, 8, H100)[:3]]
    assert [(one.tp, one.pp, one.cp) for one in first] == [(2, 1, 1), (2, 1, 2), (2, 1, 4)]


@pytest.mark.parametrize(
    "ranks, targets, says",
    [
        (3, 0, "rows of 3 ranks must be a multiple of 1 .* 8 data x .*: change --dr-row-ranks"),
        (0, 8, "--dr-target-ranks 8 must be below the data-parallel size 8"),
    ],
)
def test_a_sweep_says_why_no_layout_can_be_had(ranks: int, targets: int, says: str) -> None:
    rows = Wanted(Rows(halves=True, target_ranks=targets), row_ranks=ranks)
    ask = Asked(LLAMA_8B, Layout(), KEPT, 64, 64, rows)
    with pytest.raises(ValueError, match=says):
        sweep.proposals(ask, 8, H100)


def test_schedule() -> None:
    """A backward after its forward and its successor's; the bubble is that of 1F1B."""
    pieces = {(p.stage, p.microbatch, p.backward): p for p in one_f_one_b(4, 6)}
    assert len(pieces) == 2 * 4 * 6
    for (stage, number, backward), piece in pieces.items():
        before = pieces.get((stage + 1 if backward else stage - 1, number, backward))
        assert before is None or before.end <= piece.start
    assert max(piece.end for piece in pieces.values()) == 3 * (6 + 3)


def test_what_takes_turns_is_hidden_by_nothing() -> None:
    """Ranks whose cores do both: overlap gains nothing, and nothing is cheaper than on a GPU."""
    replace, turns = dataclasses.replace, dataclasses.replace(H100, overlaps=False)
    overlap, _ = asked.settle(wanted(replace(TWO, cp=2)), H100)
    without = replace(overlap, layout=replace(overlap.layout, overlap=False, overlap_gather=False))
    assert step.seconds(overlap, turns) == step.seconds(without, turns)
    assert sum(step.seconds(overlap, turns).values()) > sum(step.seconds(overlap, H100).values())


def test_hardware_of_a_table() -> None:
    found = hardware.parse({"memory": "96e9", "inside": {"bandwidth": 1e11}, "node": 4})
    assert (found.memory, found.inside.bandwidth, found.node) == (96e9, 1e11, 4)
    assert found.inside.latency == H100.inside.latency and found.flops == H100.flops


@pytest.mark.parametrize(
    "table, says",
    [
        ([1], "must be names and numbers"),
        ({"memroy": 1}, "'memroy' is none of the hardware's names"),
        ({"memory": "much"}, "memory must be a number above 0, not 'much'"),
        ({"flops": 0}, "flops must be a number above 0, not 0"),
        ({"overlaps": "no"}, "overlaps must be true or false, not 'no'"),
        ({"between": 3}, "between must have bandwidth and latency, not 3"),
        ({"between": {"bandwidth": -1}}, "between.bandwidth must be a number above 0, not -1"),
        ({"between": {"latency": True}}, "between.latency must be a number of 0 or more, not True"),
        ({"node": 0.5}, "node must be a whole number of GPUs, not 0.5"),
        ({"node": True}, "node must be a number above 0, not True"),
        ({"memory": True}, "memory must be a number above 0, not True"),
        ({"reserved": "100e9"}, r"reserved, 1e\+11 bytes, must be less than memory, 8e\+10"),
        ({"memory": 4e9}, r"reserved, 5e\+09 bytes, must be less than memory, 4e\+09"),
    ],
)
def test_hardware_that_is_none(table: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        hardware.parse(table)


@pytest.mark.parametrize(
    "ask, says",
    [
        (wanted(Layout(dp=7)), "--global-batch-size 64 is not a multiple of"),
        (wanted(Layout(dp=16)), "--dr-target-batch-size 8 is not a multiple of"),
        (wanted(Layout(dp=2), target_ranks=2), "--dr-target-ranks 2 must be below"),
    ],
)
def test_batches_that_cannot_be(ask: Asked, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        asked.settle(ask, H100)
