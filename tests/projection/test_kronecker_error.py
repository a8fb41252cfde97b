"""Sizes of Kronecker sketches keep the wanted error, and their halves tell the error there is."""

import math

import pytest
import torch
from _samplers import normal
from torch import Tensor

from megatron_dr.projection.kronecker import Kronecker, sizes_for
from megatron_dr.projection.sketch_error import product_errors

SEEDS, SHAPE = 100, (90, 70)


def gradients(rank: int) -> Tensor:
    """[R, O, I]: the last is the target."""
    left, right = normal(7 * 90, rank, seed=1), normal(7 * 70, rank, seed=2)
    return left.view(7, 90, rank) @ right.view(7, 70, rank).transpose(1, 2)


def sketched(g_ROI: Tensor, sizes: tuple[int, int], seed: int) -> Tensor:
    sketch = Kronecker("w", *g_ROI.shape[1:], *sizes, seed)
    out, inner = (sketch.columns(side, None, "cpu", torch.float32) for side in ("out", "in"))
    g_RKI = g_ROI.float() if out is None else out @ g_ROI.float()
    return g_RKI if inner is None else g_RKI @ inner.t()


def errors(g_ROI: Tensor, sizes: tuple[int, int]) -> tuple[float, float]:
    """Of products with the target, relative to the lengths: as they are, and as estimated."""
    exact_M = (g_ROI[:-1] * g_ROI[-1]).sum((1, 2))
    length = float(g_ROI[:-1].square().sum() * g_ROI[-1].square().sum())
    wrong = seen = 0.0
    for seed in range(SEEDS):
        c_RKK = sketched(g_ROI, sizes, seed)
        products_M = (c_RKK[:-1] * c_RKK[-1]).sum((1, 2))
        wrong += float((products_M - exact_M).square().sum()) / length / SEEDS
        error, _ = product_errors(c_RKK[:-1], c_RKK[-1], g_ROI.shape[1:])
        seen += float(error) / length / SEEDS
    return math.sqrt(wrong), math.sqrt(seen)


@pytest.mark.parametrize("sizes", [(32, 32), (90, 16), (8, 70), (5, 7)])
@pytest.mark.parametrize("rank", [1, 20])
def test_the_estimate_is_the_error(rank: int, sizes: tuple[int, int]) -> None:
    """And below its bound, near which gradients of rank one come where rows are the target."""
    wrong, seen = errors(gradients(rank), sizes)
    assert seen == pytest.approx(wrong, rel=0.3)
    terms = [1.0 if n == K else 1 + 2 / K for K, n in zip(sizes, SHAPE, strict=True)]
    assert wrong < math.sqrt(math.prod(terms) - 1)


def test_without_a_sketch_there_is_no_error_and_nan_stays_nan() -> None:
    g_ROI = gradients(3)
    assert float(product_errors(g_ROI[:-1], g_ROI[-1], SHAPE)[0]) == 0.0
    c_RKK = sketched(g_ROI, (16, 16), 0)
    c_RKK[0, 3, 4] = math.nan
    assert product_errors(c_RKK[:-1], c_RKK[-1], SHAPE)[0].isnan()
    assert product_errors(c_RKK[1:-1, :1], c_RKK[-1, :1], SHAPE)[0].isnan()  # no halves of one


SHAPES = [(128, 128), (384, 128), (512, 512), (4096, 4096), (128256, 4096), (30, 4096)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("error", [0.9, 0.3, 0.15, 0.1, 0.01])
def test_sizes_keep_the_error_with_few_numbers(error: float, shape: tuple[int, int]) -> None:
    def bound(sizes: tuple[int, int]) -> float:
        terms = [1.0 if n == K else 1 + 2 / K for K, n in zip(sizes, shape, strict=True)]
        return math.sqrt(math.prod(terms) - 1)

    sizes = sizes_for(error, *shape)
    assert all(n == K or (K % 32 == 0 and n > K) for K, n in zip(sizes, shape, strict=True))
    assert bound(sizes) <= error * (1 + 1e-9)
    for side in (0, 1):
        if sizes[side] not in (32, shape[side]):
            less = (sizes[0] - 32 * (side == 0), sizes[1] - 32 * (side == 1))
            assert bound(less) > error or sizes[0] == sizes[1]  # even sides fall together
    alone = [(shape[0], K) for K in range(32, shape[1] + 1, 32)]
    assert all(math.prod(sizes) <= math.prod(p) for p in alone if bound(p) <= error)


def test_sizes_given_are_kept() -> None:
    assert sizes_for(0.1, 512, 512, 64, 32) == (64, 32)
    assert sizes_for(0.1, 512, 40, 64, 64) == (64, 40)
    assert sizes_for(0.15, 4096, 4096, 64) == (64, 192)
    assert sizes_for(0.15, 4096, 4096, None, 64) == (192, 64)
    for error in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="error is"):
            sizes_for(error, 512, 512)
