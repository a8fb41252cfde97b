"""The plan's bytes and memory are those of real runs."""

import math

import pytest

from megatron_dr import DRConfig
from megatron_dr.mcore.buffer_rows.row_groups import near_a_node
from megatron_dr.plan import timeline
from megatron_dr.plan.buffers import stages
from megatron_dr.plan.hardware import Hardware, Link
from megatron_dr.plan.layout import Layout as Planned
from megatron_dr.plan.model import Model
from megatron_dr.plan.rows import Rows, ranks_near_a_node
from megatron_dr.plan.timeline import Batch

from . import _counted
from ._data import Layout

RANK = DRConfig(rows="rank", gram="exact")
SLOTS = DRConfig(slots=2, gram="exact")
SKETCH = DRConfig(slots=2, gram="sketch", sketch_size=64)
AUTO = dict(alpha_style="auto", target_size=9, alpha_steps=9, gram="exact")
BF16 = dict(bf16=True, distributed_optimizer=True)

CASES: dict[str, _counted.Case] = {
    "one": (Layout(bf16=True), DRConfig(slots=4, gram="sketch", sketch_size=64)),
    "dp2-overlap": (Layout(dp=2, overlap=True, **BF16), RANK),
    "dp2-plain": (Layout(dp=2), SLOTS),
    "dp2-bf16": (Layout(dp=2, overlap=True, bf16_buffers=True, **BF16),
                 DRConfig(slots=2, slot_dtype="bf16", gram="exact")),
    "tp2-sp": (Layout(tp=2, sequence_parallel=True, layer_norm=True, bf16=True), SKETCH),
    "pp2-tied": (Layout(pp=2, tied=True), SKETCH),
    "cp2": (Layout(cp=2, **BF16), SLOTS),
    "dp4-row2": (Layout(dp=4, overlap=True, overlap_param_gather=True, row_ranks=2, **BF16),
                 DRConfig(rows="rank", gram="exact", row_ranks=2)),
    "dp4-halves": (Layout(dp=4, **BF16), DRConfig(rows="rank", **AUTO)),
    "tp2-dp2": (Layout(tp=2, dp=2, sequence_parallel=True, overlap=True, **BF16), RANK),
    "pp2-dp2": (Layout(pp=2, dp=2, tied=True, overlap=True, **BF16), SLOTS),
    "moe-ep2-dp4": (Layout(dp=4, ep=2, moe=True, **BF16), RANK),
}  # fmt: skip


@pytest.fixture(scope="module")
def figures() -> dict[str, _counted.Figures]:
    return _counted.measured(CASES)


@pytest.mark.parametrize("name", CASES)
def test_bytes_and_memory(figures: dict[str, _counted.Figures], name: str) -> None:
    """Within 1%; what is below it are scalars."""
    for what, (found, said) in figures[name].items():
        assert found == pytest.approx(said, rel=0.01, abs=400), what


# -- by arithmetic alone -------------------------------------------------------------------------
SMALL = Model(layers=4, hidden=64, heads=4, groups=2, ffn=128, vocabulary=1000)
SLOW = Hardware(
    node=2, memory=1e9, memory_bandwidth=1e9, inside=Link(1e6, 0.0), between=Link(1e5, 0.0),
    flops=1e12, doubles=1e12, solve=0.5,
)  # fmt: skip
BATCH = Batch(tokens=1, microbatches=4)


@pytest.mark.parametrize(
    "model, parameters",
    [
        (Model(32, 4096, 32, 8, 14336, 128256), 8_030_261_248),  # Llama-3.1 8B
        (Model(80, 8192, 64, 8, 28672, 128256), 70_553_706_496),  # Llama-3.1 70B
        (Model(64, 5120, 40, 8, 27648, 152064, qkv_bias=True), 32_763_876_352),  # Qwen2.5 32B
    ],
)
def test_sizes_of_known_models(model: Model, parameters: int) -> None:
    """As their checkpoints have them."""
    assert sum(b.filled for b in stages(model, Planned())[0].buffers) == parameters


def test_rows_of_a_node() -> None:
    for dp in (1, 2, 8, 24, 64, 512, 2048):
        for tp in (1, 4, 8):
            wanted = near_a_node(dp, 1, min(dp, 8 // tp))
            assert ranks_near_a_node(Planned(dp=dp, tp=tp), 8) == wanted


def test_without_overlap_everything_is_exposed() -> None:
    layout = Planned(dp=4, overlap=False)
    (buffer,) = stages(SMALL, layout)[0].buffers
    ring = 4 * buffer.numel * 3 / 4 / 2 / 1e5  # two nodes of two: half leaves the node
    plain = timeline.exposed(SMALL, layout, SLOW, BATCH)
    ours = timeline.exposed(SMALL, layout, SLOW, BATCH, Rows(ranks=2))
    assert plain["gradients"] == pytest.approx(ring)
    assert ours["target"] == pytest.approx(ring)
    inside, between = 4 * buffer.numel / 2 / 1e6, 4 * buffer.numel / 4 / 1e5
    assert ours["gradients"] == pytest.approx(inside + between)
    assert ours["solve"] == 0.5 and ours["gather"] == 0.0


def test_with_a_long_backward_the_last_bucket_is_exposed() -> None:
    layout, slow = Planned(dp=2, bucket=50_000), Batch(tokens=10**9, microbatches=4)
    (buffer,) = stages(SMALL, layout)[0].buffers
    assert len(buffer.buckets) > 2
    plain = timeline.exposed(SMALL, layout, SLOW, slow)
    ours = timeline.exposed(SMALL, layout, SLOW, slow, Rows())
    last = 4 * buffer.buckets[-1] / 2 / 1e6
    assert plain["gradients"] == pytest.approx(last, rel=1e-6)
    assert ours["gradients"] == pytest.approx(last, rel=1e-6) and ours["target"] == 0.0


def test_two_buckets_travel_at_a_time() -> None:
    """The third waits for the first, and the backward with it; so does nothing of plain's."""
    layout = Planned(dp=2, bucket=50_000)
    plain = timeline.exposed(SMALL, layout, SLOW, BATCH)
    ours = timeline.exposed(SMALL, layout, SLOW, BATCH, Rows())
    assert ours["gradients"] == pytest.approx(plain["gradients"])  # the links are always busy
    assert math.isclose(plain["gradients"], 4 * sum(
        stages(SMALL, layout)[0].buffers[0].buckets) / 2 / 1e6, rel_tol=0.01)  # fmt: skip


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="7 layers can't be dealt out to 2 pipeline stages"):
        Planned(pp=2).chunks(7)
    with pytest.raises(ValueError, match="rows of 3 ranks must be a multiple of 1"):
        Rows(ranks=3).of(Planned(dp=4))


def test_uneven_stages() -> None:
    assert Planned(pp=4, first=1, last=3).chunks(8) == [[1], [2], [2], [3]]
    assert Planned(pp=2, vpp=2).chunks(8) == [[2, 2], [2, 2]]
