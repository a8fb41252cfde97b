"""Exact rows cost no wire and at most one bucket of memory: counted, not claimed."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore import collectives
from megatron_dr.mcore.attach import attached
from megatron_dr.mcore.buffer_rows.exact_gram import ExactGram

from . import _megatron, _oracle
from ._data import Layout
from ._ranks import run_ranks

DP4 = Layout(dp=4, target_ranks=1)
LAYOUTS = {
    "dp4": DP4,
    "dp4-distopt": Layout(dp=4, target_ranks=1, distributed_optimizer=True),
    "dp4-distopt-overlap": Layout(dp=4, target_ranks=1, distributed_optimizer=True, overlap=True),
    "dp2-tp2": Layout(dp=2, tp=2, target_ranks=1, targets=2, distributed_optimizer=True),
    "dp2-pp2": Layout(dp=2, pp=2, target_ranks=1, targets=2, distributed_optimizer=True),
}


class Counter:
    """Counts what a rank sends: wraps torch.distributed's collectives, which still run."""

    def __init__(self) -> None:
        self.bytes = 0
        reduce, gather = collectives.all_reduce_bytes, collectives.scatter_bytes
        self._count("all_reduce", lambda x, n: reduce(x[0].nbytes, n))
        self._count("reduce_scatter_tensor", lambda x, n: gather(x[1].nbytes, n))
        self._count("all_gather_into_tensor", lambda x, n: gather(x[0].nbytes, n))
        self._count("all_to_all_single", lambda x, n: gather(x[0].nbytes, n))
        for name in ("_reduce_scatter_base", "_all_gather_base", "dist_reduce_scatter_func"):
            self._alias(name)

    def _count(self, name: str, cost: Any) -> None:
        stock = getattr(dist, name)

        def counted(*args: Any, **kw: Any) -> Any:
            tensors = [*args, *(kw[k] for k in ("output", "tensor", "input") if k in kw)]
            self.bytes += cost(tensors, dist.get_world_size(kw.get("group")))
            return stock(*args, **kw)

        setattr(dist, name, counted)

    def _alias(self, name: str) -> None:
        """Megatron's own name for the reduce-scatter."""
        from megatron.core.distributed import param_and_grad_buffer as module

        if hasattr(module, name):
            setattr(module, name, dist.reduce_scatter_tensor)


def steps(layout: Layout, dr: DRConfig | None, initial: Any, number: int = 2) -> tuple[int, Any]:
    """Bytes that a rank sends in some steps after the model is built, and the handle."""
    counter = Counter()
    started = {}

    def plugin(model: Any, optimizer: Any, config: Any) -> Any:
        handle = None if dr is None else megatron_dr.attach(model, optimizer, config, dr)
        started["at"] = counter.bytes
        return handle

    model = _megatron.train(layout, number, initial, plugin)[0]
    return counter.bytes - started["at"], attached(model)


def sent(layout: Layout, dr: DRConfig | None, initial: Any) -> int:
    return steps(layout, dr, initial)[0]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_exact_rows_send_what_plain_megatron_sends(layout: Layout) -> None:
    initial = _oracle.initial(layout)
    dr = DRConfig(rows="rank", target_ranks=1)  # auto: exact, as it sends less
    stock = run_ranks(layout.world, sent, layout, None, initial)
    ours = run_ranks(layout.world, sent, layout, dr, initial)
    assert min(stock) > 50_000
    for plain, projected in zip(stock, ours, strict=True):
        assert abs(projected - plain) <= 0.01 * plain, (projected, plain)


def test_sketches_send_less_than_exact_slots() -> None:
    layout = Layout(dp=2, distributed_optimizer=True)
    initial = _oracle.initial(layout)
    few = DRConfig(slots=2, gram="sketch", sketch_size=64)
    stock, exact, sketched = (
        run_ranks(2, sent, layout, dr, initial)[0]
        for dr in (None, DRConfig(slots=2, gram="exact"), few)
    )
    assert stock < sketched < exact


def announced(layout: Layout, dr: DRConfig, initial: Any) -> tuple[str, int, int]:
    """The kind of gram, and a step's bytes: those that it reports, and all that were counted."""
    counted, handle = steps(layout, dr, initial, 1)
    return type(handle.rows.source).__name__, int(handle.metrics["dr bytes"]), counted


@pytest.mark.parametrize(
    "layout", [Layout(dp=2), Layout(dp=2, per_token=True, distributed_optimizer=True)],
    ids=["dp2", "per-token"],
)  # fmt: skip
@pytest.mark.parametrize("gram", ["sketch", "exact"])
def test_reported_bytes_are_what_plain_megatron_does_not_send(layout: Layout, gram: Any) -> None:
    initial = _oracle.initial(layout)
    dr = DRConfig(slots=2, gram=gram, sketch_size=64)
    plain = run_ranks(layout.world, plain_step, layout, initial)
    found = run_ranks(layout.world, announced, layout, dr, initial)
    for (_, reported, counted), stock in zip(found, plain, strict=True):
        assert reported == pytest.approx(counted - stock, abs=64) and reported > 0


def test_reported_bytes_under_tensor_parallelism() -> None:
    """The target's own forward sends there too: what differs between grams is ours alone."""
    layout = Layout(dp=2, tp=2)
    initial = _oracle.initial(layout)
    configs = [DRConfig(slots=2, gram=g, sketch_size=64) for g in ("sketch", "exact")]
    sketched, exact = (run_ranks(4, announced, layout, dr, initial) for dr in configs)
    for (_, few, one), (_, many, other) in zip(sketched, exact, strict=True):
        assert many - few == pytest.approx(other - one, rel=0.02) and many > few > 0


def plain_step(layout: Layout, initial: Any) -> int:
    return steps(layout, None, initial, 1)[0]


@pytest.mark.parametrize(
    "layout, dr, kind",
    [
        (DP4, DRConfig(rows="rank", target_ranks=1), "ExactGram"),
        (Layout(), DRConfig(slots=4), "ExactGram"),  # one rank: nothing to send
        # inside a node a row is sent in less time than its sketch is made
        (Layout(dp=2), DRConfig(slots=2, sketch_size=64), "ExactGram"),
        # rows that travel in the backward expose less than Megatron's reduction after it
        (Layout(dp=2, overlap=True), DRConfig(slots=2, sketch_size=64), "ExactGram"),
        (
            Layout(dp=2, overlap=True, distributed_optimizer=True, domains=2),
            DRConfig(rows="domain", domains=("a", "b"), sketch_size=64), "ExactGram",
        ),  # of domains none travels in the backward
        (Layout(dp=2), DRConfig(slots=2, sketch_size=2**20), "ExactGram"),
        (Layout(dp=2), DRConfig(slots=2, sketch_size=64, gram="exact"), "ExactGram"),
    ],
    ids=["target-ranks", "one-rank", "small-sketch", "overlap", "overlap-domains", "large-sketch",
         "asked"],
)  # fmt: skip
def test_auto_takes_what_exposes_less(layout: Layout, dr: DRConfig, kind: str) -> None:
    if dr.gram == "exact":
        dr = DRConfig(slots=2, gram="exact")
    found = run_ranks(layout.world, announced, layout, dr, _oracle.initial(layout))
    assert {k for k, _, _ in found} == {kind}


def on_nodes(layout: Layout, dr: DRConfig, initial: Any, node: int) -> str:
    """The kind of gram on nodes of so many ranks."""
    os.environ["LOCAL_WORLD_SIZE"] = str(node)
    return announced(layout, dr, initial)[0]


@pytest.mark.parametrize(
    "node, slots, kind",
    [
        (2, 8, "ExactGram"),  # nothing leaves the node
        (1, 2, "ExactGram"),  # three rows to send are less than their sketches
        (1, 8, "SketchedGram"),  # nine are more, as what a sketch takes is mostly of one
    ],
)
def test_auto_knows_what_crosses_between_nodes(node: int, slots: int, kind: str) -> None:
    layout = Layout(dp=2, distributed_optimizer=True, sequences=slots)
    dr = DRConfig(slots=slots, sketch_size=64)
    assert set(run_ranks(2, on_nodes, layout, dr, _oracle.initial(layout), node)) == {kind}


def peak(layout: Layout, initial: Any) -> tuple[int, int]:
    """Most bytes that a projection holds beyond what was there, and a bucket's."""
    from megatron_dr.mcore.buffer_rows import exact_gram

    exact_gram._PRODUCT["cpu"] = 500  # small beside a bucket, as it is in a large model
    dr = DRConfig(rows="rank", target_ranks=1, gram="exact")
    found = []

    def plugin(model: Any, optimizer: Any, config: Any) -> Any:
        handle = megatron_dr.attach(model, optimizer, config, dr)
        stock = handle.rows.source.gram

        def measured(*args: Any) -> Any:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                gram = stock(*args)
            held = most = 0
            for event in profiler.profiler.kineto_results.events():
                if event.name() == "[memory]":
                    held += event.nbytes()
                    most = max(most, held)
            found.append(most)
            return gram

        handle.rows.source.gram = measured
        return handle

    model = _megatron.train(layout, 1, initial, plugin)[0]
    groups = model[0].bucket_groups
    return found[0], max(b.grad_data.nbytes for g in groups for b in g.buckets)


def test_extra_memory_is_about_a_bucket() -> None:
    """One bucket is received while another is sent from in place."""
    layout = Layout(dp=4, target_ranks=1, distributed_optimizer=True)
    for most, bucket in run_ranks(4, peak, layout, _oracle.initial(layout)):
        assert 0.9 * bucket < most < 1.2 * bucket, (most, bucket)


def test_a_large_unit_is_exchanged_and_multiplied_in_chunks() -> None:
    from megatron_dr.mcore.buffer_rows import exact_gram, exchange

    layout = Layout(dp=2)
    initial = _oracle.initial(layout)

    def gram(small: bool) -> Any:
        if small:
            exact_gram._CHUNK = exchange._CHUNK = 1000
            exact_gram._PRODUCT["cpu"] = 777
        dr = DRConfig(slots=2, gram="exact")
        model, _, cfg, log = _megatron.train(
            layout, 1, initial, lambda m, o, c: megatron_dr.attach(m, o, c, dr)
        )
        assert isinstance(attached(model).rows.source, ExactGram)  # type: ignore[union-attr]
        return log[0][1].gram_BRR, _megatron.pieces(model, cfg)

    (whole, parameters), (parts, others) = run_ranks(2, gram, False)[0], run_ranks(2, gram, True)[0]
    length = whole.diagonal(dim1=1, dim2=2).amax()
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-7 * float(length))
    for (_, _, _, one), (_, _, _, other) in zip(parameters, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
