"""The error of a sketched gram is what the formulas say, for vectors of any kind."""

import math

import pytest
import torch
from _samplers import normal
from torch import Tensor

from megatron_dr.projection import CountSketch, gram_and_error, gram_of, key_of, size_for

SEEDS = 100


def vectors(kind: str) -> Tensor:
    """X [R, N]. orthogonal: R equal lengths. common: cosines of .9. heavy: 200 elements of 4000
    hold nearly all; few: 20. unequal: lengths from 1 to 1000. repeated: one vector R times."""
    X_RN = normal(8, 4000, seed=1)
    if kind == "orthogonal":
        return torch.linalg.qr(X_RN.T)[0].T
    if kind == "common":
        return X_RN + 3 * normal(1, 4000, seed=2)
    if kind in ("heavy", "few"):
        every = 20 if kind == "heavy" else 200
        return X_RN * torch.where(torch.arange(4000) % every == 0, 100.0, 1.0)
    if kind == "unequal":
        return X_RN * torch.logspace(0, 3, 8)[:, None]
    return X_RN[:1].expand(8, -1) if kind == "repeated" else X_RN


KINDS = ["orthogonal", "gaussian", "common", "heavy", "unequal", "repeated"]


def sketches(X_RN: Tensor, size: int) -> Tensor:
    """[SEEDS, R, K]: each seed a block."""
    out_BRK = torch.zeros(SEEDS, len(X_RN), size)
    for seed, out_RK in enumerate(out_BRK):
        CountSketch(size, seed).add_(out_RK, X_RN.float(), torch.arange(X_RN.shape[1]), key_of("a"))
    return out_BRK


def concentration(X_RN: Tensor) -> float:
    """2 sum_n |x_n|^4 / (tr(A)^2 + |A|^2): the share by which the estimate exceeds the error."""
    gram_RR = X_RN @ X_RN.T
    scale = gram_RR.trace() ** 2 + gram_RR.square().sum()
    return float(2 * X_RN.square().sum(0).square().sum() / scale)


@pytest.mark.parametrize(
    "kind, size", [(kind, size) for kind in KINDS for size in (64, 1024, 16384)] + [("few", 64)]
)
def test_estimate_is_the_mean_squared_error(kind: str, size: int) -> None:
    """Averaged over seeds, less the share that is left out: within 4 standard errors, all small."""
    X_RN = vectors(kind)
    gram_BRR, error_sq_B = gram_and_error(sketches(X_RN, size))
    true_B = (gram_BRR - X_RN @ X_RN.T).square().sum((1, 2))
    standard_error = true_B.std() / SEEDS**0.5
    assert standard_error <= 0.2 * true_B.mean()
    estimate = error_sq_B.mean() * (1 - concentration(X_RN))
    assert abs(estimate - true_B.mean()) <= 4 * standard_error


@pytest.mark.parametrize("kind", ["orthogonal", "heavy"])
def test_estimate_hardly_varies(kind: str) -> None:
    error_B = gram_and_error(sketches(vectors(kind), 1024))[1].sqrt()
    assert error_B.std() <= 0.05 * error_B.mean()


def test_halves_would_be_far_off_where_few_elements_hold_much() -> None:
    """Why the estimate is not the difference of the grams of half the buckets each."""
    X_RN = vectors("heavy")
    rows_BRK = sketches(X_RN, 16384)
    first, second = gram_of(rows_BRK[..., :8192]), gram_of(rows_BRK[..., 8192:])
    halves = (first - second).square().sum((1, 2)).mean()
    true = (first + second - X_RN @ X_RN.T).square().sum((1, 2)).mean()
    assert halves > 20 * true
    assert gram_and_error(rows_BRK)[1].mean() < 1.2 * true


def test_gram_is_that_of_the_sketches() -> None:
    rows_BRK = normal(3, 5, 64, seed=1).float()
    gram_BRR, error_sq_B = gram_and_error(rows_BRK)
    assert torch.equal(gram_BRR, gram_of(rows_BRK))
    assert gram_BRR.dtype == error_sq_B.dtype == torch.float64 and error_sq_B.shape == (3,)


def test_error_of_the_gram_scales_with_the_gram() -> None:
    rows_BRK = normal(2, 5, 64, seed=1)
    error_sq_B = gram_and_error(rows_BRK)[1]
    for scale in (1e-20, 1e20):
        torch.testing.assert_close(gram_and_error(scale * rows_BRK)[1], scale**4 * error_sq_B)
    assert gram_and_error(0 * rows_BRK)[1].tolist() == [0.0, 0.0]
    rows_BRK[0, 1, 2] = torch.nan
    assert gram_and_error(rows_BRK)[1].isfinite().tolist() == [False, True]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [0.3, 0.1])
def test_size_keeps_the_error(kind: str, error: float) -> None:
    """For any vectors; and half that size would not do for equal ones at right angles."""
    X_RN = vectors(kind)
    A_RR = X_RN @ X_RN.T

    def relative(size: int) -> float:
        gram_BRR = gram_of(sketches(X_RN, size))
        return float((gram_BRR - A_RR).square().sum((1, 2)).mean().sqrt() / A_RR.norm())

    size = size_for(error, len(X_RN))
    assert relative(size) <= error
    if kind == "orthogonal":
        assert relative(size // 2) > error


@pytest.mark.parametrize("num_vectors", [1, 2, 9, 17, 1025])
@pytest.mark.parametrize("error", [0.9, 0.5, 0.25, 0.1, 0.05, 0.001])
def test_size_is_the_smallest_power_of_two(error: float, num_vectors: int) -> None:
    size = size_for(error, num_vectors)
    CountSketch(size, 0)  # accepts it
    assert math.sqrt((num_vectors + 1) / size) <= error < math.sqrt(2 * (num_vectors + 1) / size)


def test_sizes_at_the_edge() -> None:
    assert size_for(0.5, 15) == 64  # (R + 1)/e^2 is 64 itself
    assert size_for(0.05, 17) == 8192
    assert size_for(2.0**-14, 7) == 2**31
    with pytest.raises(ValueError, match="at least 6.5e-05"):
        size_for(2.0**-14, 8)


@pytest.mark.parametrize("error", [0.0, 1.0, -0.1, 5e-324, math.nan, math.inf])
def test_bad_error(error: float) -> None:
    with pytest.raises(ValueError, match="error is"):
        size_for(error, 17)


def test_no_vectors() -> None:
    with pytest.raises(ValueError, match="num_vectors is 0"):
        size_for(0.1, 0)
