"""The most that a real run's forwards keep for their backwards, counted."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state

from . import _data, _megatron
from ._ranks import run_ranks


class Saved:
    """Bytes of tensors that autograd keeps, each storage once; parameters are not among them."""

    def __init__(self) -> None:
        self.known: set[int] = set()
        self.times: Counter[int] = Counter()
        self.held = self.most = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: _Kept(t, self), lambda k: k.tensor):
            yield


class _Kept:
    def __init__(self, tensor: torch.Tensor, saved: Saved) -> None:
        storage = tensor.untyped_storage()
        self.tensor, self.saved, self.key = tensor, saved, storage.data_ptr()
        self.size = 0 if self.key in saved.known else storage.nbytes()
        saved.times[self.key] += 1
        if saved.times[self.key] == 1:
            saved.held += self.size
            saved.most = max(saved.most, saved.held)

    def __del__(self) -> None:
        self.saved.times[self.key] -= 1
        if not self.saved.times[self.key]:
            self.saved.held -= self.size


def most(layout: _data.Layout, options: dict[str, Any]) -> list[tuple[int, int]]:
    """Of each rank its pipeline stage, and the most bytes of a step.

    Args:
        options: fields of Megatron's TransformerConfig that the layout doesn't have.
    """
    return run_ranks(layout.world, _of_rank, layout, options)


def _of_rank(layout: _data.Layout, options: dict[str, Any]) -> tuple[int, int]:
    saved = Saved()
    with mock.patch.object(
        _megatron, "transformer_config", with_options(_megatron.transformer_config, options)
    ):
        train(layout, 1, saved)
    return parallel_state.get_pipeline_model_parallel_rank(), saved.most


def train(layout: _data.Layout, steps: int, saved: Saved, plugin: Any = None) -> Any:
    """As `_megatron.train`."""

    def watch(model: list[Any], optimizer: Any, config: Any) -> Any:
        parameters = [p for chunk in model for p in chunk.parameters()]
        saved.known |= {p.untyped_storage().data_ptr() for p in parameters}
        return plugin(model, optimizer, config) if plugin else None

    with saved.counted():
        return _megatron.train(layout, steps, None, watch)


def with_options(stock: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def config(layout: _data.Layout) -> Any:
        found = stock(layout)
        for name, value in options.items():
            setattr(found, name, value)
        return found

    return config
