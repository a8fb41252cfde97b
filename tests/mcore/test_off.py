"""Off means off: bit for bit Megatron's own, weights and optimizer state."""

from typing import Any

import pytest
import torch

import megatron_dr
from megatron_dr import DRConfig

from . import _megatron
from ._data import Layout
from ._ranks import run_ranks

LAYOUTS = {
    "plain": Layout(dp=2, targets=0),
    "overlap": Layout(dp=2, targets=0, overlap=True),
    "distopt": Layout(dp=2, targets=0, distributed_optimizer=True),
    "distopt-overlap": Layout(dp=2, targets=0, distributed_optimizer=True, overlap=True),
    "instances": Layout(dp=4, targets=0, distributed_optimizer=True, instances=2),
    "instances-overlap": Layout(
        dp=4, targets=0, distributed_optimizer=True, instances=2, overlap=True
    ),
    "tp2-sp-token": Layout(tp=2, targets=0, sequence_parallel=True, per_token=True),
    "pp2-vpp2": Layout(pp=2, vpp=2, targets=0),
}


class Leaving:
    """A handle that goes after its first step."""

    def __init__(self, handle: Any) -> None:
        self.handle, self.rows = handle, handle.rows

    def step(self, function: Any, **schedule: Any) -> Any:
        if self.handle is None:
            own = ("target_data_iterator", "num_target_microbatches", "domains", "target_sets")
            for name in own:
                del schedule[name]
            return function(**schedule)
        reports = self.handle.step(function, **schedule)
        self.handle.detach()
        self.handle = None
        return reports


def state(layout: Layout, dr: DRConfig | None, leaves: bool = False) -> list[torch.Tensor]:
    """Parameters and optimizer state after three steps."""

    def plugin(model: Any, optimizer: Any, config: Any) -> Any:
        if dr is None:
            return None
        handle = megatron_dr.attach(model, optimizer, config, dr)
        return Leaving(handle) if leaves else handle

    model, optimizer, _, _ = _megatron.train(layout, 3, None, plugin)
    tensors = [p.detach() for chunk in model for p in chunk.parameters()]
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for values in part.optimizer.state.values():
            tensors += [v for v in values.values() if torch.is_tensor(v)]
    return tensors


def assert_bitwise(layout: Layout, dr: DRConfig, leaves: bool = False) -> None:
    stock = run_ranks(layout.world, state, layout, None)
    plugin = run_ranks(layout.world, state, layout, dr, leaves)
    for a, b in zip(stock, plugin, strict=True):
        assert len(a) == len(b) > 0
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_mean_without_target_is_stock(layout: Layout) -> None:
    assert_bitwise(layout, DRConfig(set="mean"))


@pytest.mark.parametrize("name", ["overlap", "distopt-overlap", "instances-overlap"])
def test_detached_in_the_middle_of_a_run_is_stock(name: str) -> None:
    assert_bitwise(LAYOUTS[name], DRConfig(set="mean"), leaves=True)


@pytest.mark.parametrize("overlap", [False, True])
def test_mean_with_a_watched_target_is_stock(overlap: bool) -> None:
    """Routing, sketching and combining run, and change nothing: the target is only measured.

    As many target microbatches as general ones, so that undoing the schedule's division by
    their sum is a multiplication by two, which is exact.
    """
    stock = Layout(dp=2, targets=0, overlap=overlap)
    watched = Layout(dp=2, targets=2 * stock.num_general, overlap=overlap)
    expected = run_ranks(2, state, stock, None)
    found = run_ranks(2, state, watched, DRConfig(set="mean", alpha=0.0))
    for a, b in zip(expected, found, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_detached_is_stock() -> None:
    layout = Layout(dp=2, overlap=True, targets=0)

    def detached() -> list[torch.Tensor]:
        def plugin(model: Any, optimizer: Any, config: Any) -> None:
            before = vars(config).copy()
            with megatron_dr.attach(model, optimizer, config, DRConfig(set="cone")):
                pass
            assert vars(config) == before

        model, _, _, _ = _megatron.train(layout, 3, None, plugin)
        return [p.detach() for chunk in model for p in chunk.parameters()]

    stock = run_ranks(2, state, layout, None)
    for a, b in zip(stock, run_ranks(2, detached), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=False))
