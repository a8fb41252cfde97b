"""Parameters, gradients, subspaces and optimizers of MeSO's tests."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dr.optim import Meso, MesoAdamW, MesoSGD, Subspaces

OUT, IN, K_OUT, K_IN = 24, 16, 6, 5
FORMS = [
    pytest.param(MesoAdamW, {"betas": (0.9, 0.95), "eps": 1e-6}, id="adamw"),
    pytest.param(MesoSGD, {"momentum": 0.9}, id="sgd"),
]


class Same(Subspaces):
    """The same subspaces in every epoch."""

    def _make(self, side: Any, length: int, size: int, epoch: int, like: Tensor) -> Tensor:
        return super()._make(side, length, size, 0, like)


class FirstAxes(Subspaces):
    """The first K axes."""

    def _make(self, side: Any, length: int, size: int, epoch: int, like: Tensor) -> Tensor:
        return torch.eye(length, dtype=like.dtype)[:size]


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    """A matrix, a vector, a matrix that is short on one side, and one on both."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(OUT, IN), (IN,), (OUT, 4), (3, 4)]
    return [
        torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes
    ]


def gradients(step: int, like: list[torch.nn.Parameter]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in like]


def train(optimizer: Any, own: list[torch.nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        for parameter, gradient in zip(own, gradients(step, own), strict=True):
            parameter.grad = gradient
        optimizer.step()


def assert_equal(first: list[Any], second: list[Any], **tolerance: float) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 1e-12, "atol": 1e-13}))


def dense(step: int, optimizer: Meso) -> tuple[Tensor, Tensor]:
    """P and Q of the matrix in a step (from 0)."""
    like, epoch = optimizer.param_groups[0]["params"][0], step // optimizer.refresh
    rows = optimizer.subspaces.rows
    return rows("out", OUT, K_OUT, epoch, like), rows("in", IN, K_IN, epoch, like)


def make(form: Any, own: Any, options: Any = None, **changes: Any) -> Any:
    sizes = {"size_out": K_OUT, "size_in": K_IN, "refresh": 4, "weight_decay": 0.2, "lr": 0.05}
    return form(own, **{**sizes, **(options or {}), **changes})
