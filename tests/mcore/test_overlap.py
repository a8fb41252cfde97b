"""Exact rows are exchanged where plain Megatron reduces: in the backward, bucket by bucket."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megatron_dr
from megatron_dr import DRConfig

from . import _megatron, _oracle
from ._data import Layout
from ._pairs import some
from ._ranks import run_ranks

BUCKETS = ("reduce_scatter_tensor", "all_to_all_single", "all_reduce")
OVERLAPPED = {
    "dp2-distopt": Layout(dp=2, distributed_optimizer=True, overlap=True),
    "dp2": Layout(dp=2, overlap=True),
    "pp2-vpp2-dp2": Layout(pp=2, vpp=2, dp=2, distributed_optimizer=True, overlap=True),
}
RANK, SLOTS = DRConfig(rows="rank", gram="exact"), DRConfig(slots=2, gram="exact")


def launches(layout: Layout, dr: DRConfig | None, initial: Any, steps: int = 3) -> Any:
    """On a rank, of the last step: (bytes of each exchange of a whole bucket, in the order of
    launch; how many of these had been launched when the finalize hook was called)."""
    log: list[int] = []
    before: list[int] = []
    done: list[int] = []
    _watch(log)

    def plugin(model: Any, optimizer: Any, config: Any) -> Any:
        stock = config.finalize_model_grads_func

        def finalize(*args: Any, **kwargs: Any) -> None:
            before.append(len(log) - sum(done))
            stock(*args, **kwargs)

        config.finalize_model_grads_func = finalize
        step = optimizer.step

        def stepped() -> Any:
            done.append(len(log) - sum(done))
            return step()

        optimizer.step = stepped
        if dr is None:
            return None
        handle = megatron_dr.attach(model, optimizer, config, dr)
        source = handle.rows.source
        project = source.gram

        def gram(*args: Any) -> Any:  # our own finalize, before Megatron's
            before.append(len(log) - sum(done))
            return project(*args)

        source.gram = gram
        return handle

    del log[:]
    _megatron.train(layout, steps, initial, plugin)
    first = before[-1] if dr is None else before[-2]
    return log[-done[-1] :], first


def _watch(log: list[int]) -> None:
    """Note every exchange of at least 100 elements, a bucket's, over a data-parallel group."""
    from megatron.core.distributed import param_and_grad_buffer as module

    for name in BUCKETS:
        stock = getattr(dist, name)

        def noted(first: torch.Tensor, *rest: Any, stock: Any = stock, **kw: Any) -> Any:
            tensor = rest[0] if rest and torch.is_tensor(rest[0]) else first
            if tensor.numel() >= 100:
                log.append(tensor.nbytes)
            return stock(first, *rest, **kw)

        setattr(dist, name, noted)
    module.dist_reduce_scatter_func = dist.reduce_scatter_tensor


@pytest.mark.parametrize("layout", OVERLAPPED.values(), ids=OVERLAPPED.keys())
def test_every_bucket_is_launched_where_plain_megatron_launches_it(layout: Layout) -> None:
    initial = _oracle.initial(layout)
    plain = run_ranks(layout.world, launches, layout, None, initial)
    ours = run_ranks(layout.world, launches, layout, RANK, initial)
    for (stock, early), (found, launched) in zip(plain, ours, strict=True):
        assert early == len(stock) > 1  # plain Megatron leaves none to the end
        assert launched == 2 * early  # each bucket once for the target, once for the general rows
        assert sorted(found[:launched]) == sorted(2 * stock)
        if layout.pp == 1:
            assert found[:early] == found[early:launched] == stock


def shares(layout: Layout, dr: DRConfig | None, initial: Any) -> tuple[float, int, int]:
    """On a rank, of the last step: the share of the exchanged bytes that were launched before the
    last backward ended, the bytes, and those that are gathered when it is over."""
    gathered: list[int] = []
    stock = dist.all_gather_into_tensor

    def noted(out: torch.Tensor, *args: Any, **kw: Any) -> Any:
        if out.numel() >= 100:
            gathered.append(out.nbytes)
        return stock(out, *args, **kw)

    dist.all_gather_into_tensor = noted
    found, launched = launches(layout, dr, initial, 3)
    return sum(found[:launched]) / sum(found), sum(found), sum(gathered) // 3


@pytest.mark.parametrize("dp", [2, 4])
@pytest.mark.parametrize("sharded", [True, False], ids=["distopt", "all"])
def test_as_plain_megatron_all_bytes_are_launched_before_the_last_backward_ends(
    dp: int, sharded: bool
) -> None:
    """Without the distributed optimizer every rank needs the whole of the combined gradient, which
    is gathered at the end: half of what Megatron's all-reduce sends in the backward."""
    layout = Layout(dp=dp, overlap=True, distributed_optimizer=sharded)
    initial = _oracle.initial(layout)
    plain = run_ranks(dp, shares, layout, None, initial)
    ours = run_ranks(dp, shares, layout, RANK, initial)
    for (stock, reduced, _), (share, exchanged, gathered) in zip(plain, ours, strict=True):
        assert share == stock == 1.0
        assert exchanged == pytest.approx(2 * reduced, rel=1e-3)  # the target's and the rows'
        assert gathered == (0 if sharded else pytest.approx(reduced, rel=1e-3))


def test_nothing_overlaps_where_megatron_does_not() -> None:
    layout = Layout(dp=2, distributed_optimizer=True)
    for found, launched in run_ranks(2, launches, layout, RANK, _oracle.initial(layout)):
        assert launched == 1 < len(found)  # the target's, when the first general backward began


def paced(layout: Layout, dr: DRConfig, initial: Any, slow: int | None) -> Any:
    """Parameters after training in which microbatches are slow, other ones on one rank."""
    count, forward_step = [0], _megatron.forward_step

    def late(data: Any, model: Any) -> Any:
        count[0] += 1
        if slow is not None and (dist.get_rank() == slow) == (count[0] % 3 == 0):
            time.sleep(0.05)
        return forward_step(data, model)

    _megatron.forward_step = late
    model, _, config, _ = _megatron.train(
        layout, 3, initial, lambda m, o, c: megatron_dr.attach(m, o, c, dr)
    )
    return [values for *_, values in _megatron.pieces(model, config)]


@pytest.mark.parametrize("dr", some({"rank": RANK, "slots": SLOTS}, "rank"))
def test_ranks_of_different_speed(dr: DRConfig) -> None:
    """Nothing waits for ever, and who is late changes nothing: bit for bit."""
    layout = OVERLAPPED["pp2-vpp2-dp2"]
    initial = _oracle.initial(layout)
    even = run_ranks(layout.world, paced, layout, dr, initial, None)
    for slow in (0, 3):
        found = run_ranks(layout.world, paced, layout, dr, initial, slow)
        for a, b in zip(even, found, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_overlap_changes_nothing() -> None:
    """One bucket or many, overlapped or not: the same parameters to float32's rounding."""
    plain, many = Layout(dp=2, distributed_optimizer=True), OVERLAPPED["dp2-distopt"]
    initial = _oracle.initial(plain)
    one = run_ranks(2, paced, plain, SLOTS, initial, None)
    other = run_ranks(2, paced, many, SLOTS, initial, None)
    for a, b in zip(one, other, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=2e-6)


def interrupted(layout: Layout, fails: Callable[[int], bool]) -> Any:
    """Train with an exception in the second step, go on without the plugin; parameters."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from . import _data

    _megatron.initialize(layout)
    model, optimizer, config = _megatron.build(layout, _oracle.initial(layout))
    rank = dist.get_rank()

    def step(number: int, handle: Any) -> None:
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        kwargs = _megatron.schedule(layout, model, _data.general(layout, number, rank))
        if handle is None:
            get_forward_backward_func()(**kwargs)
        else:
            handle.step(
                get_forward_backward_func(), num_target_microbatches=layout.num_target,
                target_data_iterator=iter(_data.target(layout, number, rank)), **kwargs,
            )  # fmt: skip
        optimizer.step()

    plain = [vars(g).copy() for g in model[0].bucket_groups]
    forward_step, count = _megatron.forward_step, [0]

    def failing(data: Any, module: Any) -> Any:
        count[0] += 1
        if fails(count[0]):
            raise ZeroDivisionError
        return forward_step(data, module)

    with megatron_dr.attach(model, optimizer, config, RANK) as handle:
        step(0, handle)
        _megatron.forward_step = failing
        with pytest.raises(ZeroDivisionError):
            step(1, handle)
        _megatron.forward_step = forward_step
    assert [vars(g).keys() for g in model[0].bucket_groups] == [p.keys() for p in plain]
    for group in model[0].bucket_groups:
        assert group.grad_reduce_handle is None and group.is_last_microbatch
    found = [p.detach().clone() for p in model[0].parameters()]
    step(2, None)
    mine = [p.detach().clone() for p in model[0].parameters()]
    return found, mine


def test_an_exception_leaves_megatron_as_it_was() -> None:
    """Buckets were in flight; plain Megatron goes on, ranks stay alike."""
    layout = Layout(dp=2, overlap=True)
    number = layout.num_target + layout.num_general
    for last in (layout.num_target + 1, number):
        ranks = run_ranks(2, interrupted, layout, lambda n, last=last: n == last)
        for (before, after), (other, same) in zip(ranks, ranks[1:], strict=False):
            assert all(torch.equal(a, b) for a, b in zip(before, other, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(after, same, strict=True))
            assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_exception_on_one_rank_leaves_megatron_as_it_was() -> None:
    """Nothing travels there."""
    layout = Layout(overlap=True)
    run_ranks(1, interrupted, layout, lambda n: n == layout.num_target + 1)


def combined(layout: Layout, dr: DRConfig | None, initial: Any) -> Any:
    """What one step leaves in main_grad."""
    model, _, config, _ = _megatron.train(
        layout, 1, initial, dr and (lambda m, o, c: megatron_dr.attach(m, o, c, dr))
    )
    return _megatron.pieces(model, config, "main_grad")


def test_gradient_buffers_in_bf16() -> None:
    """--grad-reduce-in-bf16: the update of fp32 buffers, to bf16's 8 bits."""
    fine = Layout(dp=2, overlap=True, bf16=True)
    rough = Layout(dp=2, overlap=True, bf16=True, bf16_buffers=True)
    initial = {k: v.bfloat16().float() for k, v in _oracle.initial(fine).items()}
    exact, close = (
        _megatron.whole(run_ranks(2, combined, layout, SLOTS, initial)) for layout in (fine, rough)
    )
    # clipped where the optimizer reads the buffers themselves, and those of bf16 it copies
    lengths = [torch.stack([v.norm() for v in one.values()]).norm() for one in (exact, close)]
    for name, value in exact.items():
        value, found = value / lengths[0], close[name] / lengths[1]
        assert (found - value).norm() <= 0.05 * value.norm(), name
