"""The plan by arithmetic alone. That runs have its bytes and memory: `tests/mcore/test_plan.py`."""

from dataclasses import replace

import pytest

from megatron_dr.plan import memory, timeline, wire
from megatron_dr.plan.buffers import stages
from megatron_dr.plan.hardware import Hardware, Link
from megatron_dr.plan.layout import Layout
from megatron_dr.plan.model import Model, parameters
from megatron_dr.plan.rows import Rows
from megatron_dr.plan.timeline import Batch

SMALL = Model(layers=4, hidden=64, heads=4, groups=2, ffn=128, vocabulary=1000)
# Links are slow and all else costs nothing, but for a solve.
SLOW = Hardware(
    node=2, memory=1e9, memory_bandwidth=1e30, inside=Link(1e6, 0.0), between=Link(1e5, 0.0),
    flops=1e12, fp32=1e30, solve=0.5,
)  # fmt: skip
SHORT, LONG = Batch(tokens=1, microbatches=4), Batch(tokens=10**9, microbatches=4)


@pytest.mark.parametrize(
    "model, elements",
    [
        (Model(32, 4096, 32, 8, 14336, 128256), 8_030_261_248),  # Llama-3.1 8B
        (Model(80, 8192, 64, 8, 28672, 128256), 70_553_706_496),  # Llama-3.1 70B
        (Model(64, 5120, 40, 8, 27648, 152064, qkv_bias=True), 32_763_876_352),  # Qwen2.5 32B
    ],
)
def test_sizes_of_known_models(model: Model, elements: int) -> None:
    """As their checkpoints have them."""
    assert sum(b.filled for b in stages(model, Layout())[0].buffers) == elements


def test_bytes_by_level() -> None:
    """Of 4 ranks on two nodes: a ring enters a node once, an all-to-all sends to each rank."""
    layout = Layout(dp=4)
    (buffer,) = stages(SMALL, layout)[0].buffers
    plain = wire.reduction(layout, buffer, buffer.numel)
    assert wire.by_level([plain], lambda rank: rank // 2) == (1.5 * buffer.numel,) * 2
    alone = wire.general(layout, Rows(), buffer, buffer.numel, 0)
    assert wire.by_level(alone, lambda rank: rank // 2) == (buffer.numel, 2.0 * buffer.numel)
    of_nodes = wire.general(layout, Rows(ranks=2), buffer, buffer.numel, 0)
    assert wire.by_level(of_nodes, lambda rank: rank // 2) == (2.0 * buffer.numel, buffer.numel)


def test_memory_of_what_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket that travels at once needs its slices; one that doesn't, two pieces."""
    layout = Layout(dp=4, overlap=False)
    (buffer,) = stages(SMALL, layout)[0].buffers
    stage = stages(SMALL, layout)[0]
    assert memory.ours(stage, Rows())["in flight"] == 4 * buffer.numel
    monkeypatch.setattr(memory, "CHUNK", 1000)
    assert memory.ours(stage, Rows())["in flight"] == 4 * 2 * 1000
    assert sum(memory.pieces(stage, buffer.numel, 4)) == buffer.numel


def test_without_overlap_everything_is_exposed() -> None:
    layout = Layout(dp=4, overlap=False)
    (buffer,) = stages(SMALL, layout)[0].buffers
    ring = 4 * buffer.numel * 3 / 4 / 2 / 1e5  # two nodes of two: half leaves the node
    plain = timeline.exposed(SMALL, layout, SLOW, SHORT)
    ours = timeline.exposed(SMALL, layout, SLOW, SHORT, Rows(ranks=2))
    assert plain["gradients"] == pytest.approx(ring)
    assert ours["target"] == pytest.approx(ring)
    inside, between = 4 * buffer.numel / 2 / 1e6, 4 * buffer.numel / 4 / 1e5
    assert ours["gradients"] == pytest.approx(inside + between)
    assert ours["solve"] == 0.5 and ours["sum"] == pytest.approx(0.0)


def test_with_a_long_backward_the_last_bucket_is_exposed() -> None:
    layout = Layout(dp=2, bucket=50_000)
    (buffer,) = stages(SMALL, layout)[0].buffers
    assert len(buffer.buckets) > 2
    plain = timeline.exposed(SMALL, layout, SLOW, LONG)
    ours = timeline.exposed(SMALL, layout, SLOW, LONG, Rows())
    last = 4 * buffer.buckets[-1] / 2 / 1e6
    assert plain["gradients"] == pytest.approx(last, rel=1e-6)
    assert ours["gradients"] == pytest.approx(last, rel=1e-6) and ours["target"] == 0.0


def test_with_a_short_backward_the_links_are_always_busy() -> None:
    layout = Layout(dp=2, bucket=50_000)
    (buffer,) = stages(SMALL, layout)[0].buffers
    for rows in (None, Rows()):
        found = timeline.exposed(SMALL, layout, SLOW, SHORT, rows)
        assert found["gradients"] == pytest.approx(4 * buffer.numel / 2 / 1e6, rel=0.01)


def test_the_target_has_a_forward_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces or not. The stages before wait with the last one, and theirs has left then."""
    layout = Layout(dp=2, pp=2)
    first, last = (4 * s.buffers[0].buckets[-1] / 2 / 1e6 for s in stages(SMALL, layout))
    assert timeline.exposed(SMALL, layout, SLOW, LONG, Rows())["target"] == 0.0
    at_once = timeline.exposed(SMALL, layout, SLOW, SHORT, Rows())
    assert at_once["target"] == pytest.approx(max(first, last), rel=1e-3)
    monkeypatch.setattr(memory, "BUCKET", 10_000)
    assert timeline.exposed(SMALL, layout, SLOW, LONG, Rows())["target"] == 0.0
    in_pieces = timeline.exposed(SMALL, layout, SLOW, SHORT, Rows())
    assert in_pieces["target"] == pytest.approx(at_once["target"])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="7 layers can't be dealt out to 2 pipeline stages"):
        parameters(replace(SMALL, layers=7), Layout(pp=2), 0)
    with pytest.raises(ValueError, match="rows of 3 ranks must be a multiple of 1"):
        Rows(ranks=3).of(Layout(dp=4))
