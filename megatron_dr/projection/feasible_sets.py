"""The sets that a target gradient is projected onto; each maps inner products to weights.

Per block, with the rows J [M, N], the target t [N], G = J J^T and c = J t,

    w = argmin over w in W of  1/2 |J^T w - t|^2 + (ridge/2) tr(G)/M |w - p|^2 ,    d = J^T w

(Hu, Liu, Mao, Ma, Dr. Post-Training, arXiv 2605.07063). A set never sees a gradient. All solve
in float64 and return float64. A block whose gram or cross is not finite gets NaN weights, on
purpose: the host's own handling of bad gradients must see them. (`Mean` and `Target` read no
values; there a bad gradient reaches the host as itself.)

Shape suffixes: M rows, N elements, K sketch size, B blocks, R = M + 1 (rows plus target).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_dr.projection.solvers import solve_qp

Centre = Literal["mean", "zero"]

_RIDGE_FOR_CHOLESKY = 1e-10
_RANK_CUTOFF = 1e-12  # eigenvalues below this fraction of the largest are zero
_VANISHING = 1e-12  # |d|^2 relative to the rows' mean |g|^2 that is rounding, not a direction


class FeasibleSet(Protocol):
    """{J^T w : w in W}, known by the weights of the projection onto it."""

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        """w [B, M] in float64, from G and c."""


@dataclass(frozen=True)
class Mean:
    """W = {1/M}: standard training on general data."""

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        """w = 1/M."""
        blocks, rows, _ = gram_BMM.shape
        return gram_BMM.new_full((blocks, rows), 1.0 / rows, dtype=torch.float64)


@dataclass(frozen=True)
class Target:
    """The whole space: target-only training. The weights are zero: the update is t itself."""

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        """w = 0; whoever combines must take d = t."""
        return torch.zeros_like(gram_BMM[..., 0], dtype=torch.float64)


@dataclass(frozen=True)
class TopK:
    """W = {1_S/|S| : |S| = k}, k = max(1, round(fraction M)), maximising c.w.

    First-order data selection: the projection's linear part. Equal scores: the lower row wins.
    """

    fraction: float

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        """1/k on the k rows with the largest c."""
        cross_BM = cross_BM.double()
        kept = max(1, round(self.fraction * cross_BM.shape[1]))
        order_BM = cross_BM.sort(dim=1, descending=True, stable=True).indices
        weights_BM = torch.zeros_like(cross_BM).scatter_(1, order_BM[:, :kept], 1.0 / kept)
        return _spoil(weights_BM, gram_BMM, cross_BM)


@dataclass(frozen=True)
class Capped:
    """W = {0 <= w <= 1/(fraction M), sum w = 1}: the convex hull of all k-subset means, p = 1/M.

    fraction = 1 is `Mean`; 1/M, or less, is `Hull`.
    """

    fraction: float
    ridge: float = 0.0

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)
        _check_ridge(self.ridge)

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        """The quadratic program over the capped simplex."""
        hessian_BMM, linear_BM = _ridged(gram_BMM, cross_BM, self.ridge, "mean")
        kept = self.fraction * cross_BM.shape[1]
        return solve_qp(
            hessian_BMM, linear_BM, upper=1.0 / kept if kept > 1.0 else None, sum_to=1.0
        )


@dataclass(frozen=True)
class Hull:
    """W = the probability simplex: the convex hull of the rows, p = 1/M."""

    ridge: float = 0.0

    def __post_init__(self) -> None:
        _check_ridge(self.ridge)

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        """The quadratic program over the simplex."""
        hessian_BMM, linear_BM = _ridged(gram_BMM, cross_BM, self.ridge, "mean")
        return solve_qp(hessian_BMM, linear_BM, upper=None, sum_to=1.0)


@dataclass(frozen=True)
class Cone:
    """W = {w >= 0}: the conic hull of the rows.

    :param centre: p of the ridge: `mean`, 1/M, or `zero`.
    """

    ridge: float = 0.0
    centre: Centre = "mean"

    def __post_init__(self) -> None:
        _check_ridge(self.ridge)
        _check_centre(self.centre)

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        """The quadratic program over the non-negative weights; a zero row without ridge: 0."""
        hessian_BMM, linear_BM = _ridged(gram_BMM, cross_BM, self.ridge, self.centre)
        return solve_qp(hessian_BMM, linear_BM, upper=None, sum_to=None)


@dataclass(frozen=True)
class Span:
    """W = R^M: least squares with a ridge towards p.

    Without a ridge and with dependent rows, the limit ridge -> 0: of all optimal w the one
    nearest to p (minimum norm where centre is `zero`). d is the same for all of them.

    :param centre: p of the ridge: `mean`, 1/M, or `zero`.
    """

    ridge: float = 0.0
    centre: Centre = "mean"

    def __post_init__(self) -> None:
        _check_ridge(self.ridge)
        _check_centre(self.centre)

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        """w = p + (G + r)^-1 (c - G p), r = ridge tr(G)/M; by Cholesky, or a pseudo-inverse.

        The pseudo-inverse (ridge below 1e-10) is an eigendecomposition, which on a GPU makes the
        host wait; the other sets never do.
        """
        gram_BMM, cross_BM = gram_BMM.double(), cross_BM.double()
        scale_B11 = _trace_scale(gram_BMM)
        centre = _centre(self.centre, gram_BMM.shape[1])
        residual_BM1 = (cross_BM - centre * gram_BMM.sum(2))[..., None] / scale_B11
        finite_B11 = gram_BMM.isfinite().all(2).all(1)[:, None, None]
        identity_MM = torch.eye(gram_BMM.shape[1], dtype=torch.float64, device=gram_BMM.device)
        matrix_BMM = torch.where(finite_B11, gram_BMM / scale_B11, identity_MM)
        if self.ridge >= _RIDGE_FOR_CHOLESKY:
            factor_BMM, _ = torch.linalg.cholesky_ex(matrix_BMM + self.ridge * identity_MM)
            half_BM1 = torch.linalg.solve_triangular(factor_BMM, residual_BM1, upper=False)
            step_BM1 = torch.linalg.solve_triangular(factor_BMM.mT, half_BM1, upper=True)
        else:
            values_BM, vectors_BMM = torch.linalg.eigh(matrix_BMM)
            kept_BM = values_BM > _RANK_CUTOFF * values_BM[:, -1:]
            inverse_BM = torch.where(kept_BM, 1.0 / (values_BM + self.ridge), 0.0)
            step_BM1 = vectors_BMM @ (inverse_BM[..., None] * (vectors_BMM.mT @ residual_BM1))
        return _spoil(centre + step_BM1[..., 0], gram_BMM, cross_BM)


def norm_scale(rule: str, gram_BMM: Tensor, weights_BM: Tensor, target_sq_B: Tensor) -> Tensor:
    """What d is multiplied by [B]: 1 (`none`), |mean g|/|d| (`general`) or |t|/|d| (`target`).

    |d|^2 = w'Gw. Where d vanishes (|d|^2 at most 1e-12 tr(G)/M) the scale is 1.
    """
    if rule not in ("none", "general", "target"):
        raise ValueError(f"norm rule is {rule!r}; it must be 'none', 'general' or 'target'.")
    gram_BMM, weights_BM = gram_BMM.double(), weights_BM.double()
    length_B = _quadratic(gram_BMM, weights_BM)
    if rule == "none":
        return torch.ones_like(length_B)
    wanted_B = target_sq_B.double() if rule == "target" else _mean_sq(gram_BMM)
    return torch.where(_vanishes(gram_BMM, length_B), 1.0, (wanted_B / length_B).sqrt())


def report(gram: Tensor, cross: Tensor, target_sq: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """What a projection did to the whole model; a quotient whose denominator vanishes is 0.

    cos_target: cosine of d = J^T w and t.      cos_general: cosine of the rows' mean and t.
    residual: |d - t| / |t|.                    effective_rows: (sum |w|)^2 / sum w^2.

    Inner products are summed over blocks first; effective_rows is the mean over blocks.
    """
    gram, cross, target_sq, weights = (x.double() for x in (gram, cross, target_sq, weights))
    target, aligned = target_sq.sum().sqrt(), (cross * weights).sum()
    length_sq = _quadratic(gram, weights)
    length_sq = length_sq.masked_fill(_vanishes(gram, length_sq), 0.0).sum()
    distance_sq = (length_sq - 2 * aligned + target_sq.sum()).clamp(min=0.0)
    return {
        "cos_target": _quotient(aligned, length_sq.sqrt() * target),
        "cos_general": _quotient(cross.mean(1).sum(), _mean_sq(gram).sum().sqrt() * target),
        "residual": _quotient(distance_sq.sqrt(), target),
        "effective_rows": _quotient(weights.abs().sum(1) ** 2, (weights**2).sum(1)).mean(),
    }


def _ridged(
    gram_BMM: Tensor, cross_BM: Tensor, ridge: float, centre: Centre
) -> tuple[Tensor, Tensor]:
    """H = G/a + ridge I and l = c/a + ridge p with a = tr(G)/M: the program divided by a."""
    gram_BMM, cross_BM = gram_BMM.double(), cross_BM.double()
    scale_B11, rows = _trace_scale(gram_BMM), gram_BMM.shape[1]
    identity_MM = torch.eye(rows, dtype=torch.float64, device=gram_BMM.device)
    linear_BM = cross_BM / scale_B11[..., 0] + ridge * _centre(centre, rows)
    return gram_BMM / scale_B11 + ridge * identity_MM, linear_BM


def _trace_scale(gram_BMM: Tensor) -> Tensor:
    """tr(G)/M [B, 1, 1], or 1 where it is zero."""
    scale_B11 = gram_BMM.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    return torch.where(scale_B11 == 0, 1.0, scale_B11)


def _centre(centre: Centre, rows: int) -> float:
    return 1.0 / rows if centre == "mean" else 0.0


def _spoil(weights_BM: Tensor, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
    """NaN for the blocks whose inner products are not finite."""
    finite_B = gram_BMM.isfinite().all(2).all(1) & cross_BM.isfinite().all(1)
    return torch.where(finite_B[:, None], weights_BM, torch.nan)


def _quadratic(gram_BMM: Tensor, weights_BM: Tensor) -> Tensor:
    """w'Gw [B], not below zero."""
    return torch.einsum("bm,bmn,bn->b", weights_BM, gram_BMM, weights_BM).clamp(min=0.0)


def _vanishes(gram_BMM: Tensor, length_sq_B: Tensor) -> Tensor:
    """Whether |d|^2 is rounding, not a direction."""
    return length_sq_B <= _VANISHING * gram_BMM.diagonal(dim1=1, dim2=2).mean(1)


def _mean_sq(gram_BMM: Tensor) -> Tensor:
    """|mean g|^2 [B]."""
    return gram_BMM.mean((1, 2)).clamp(min=0.0)


def _quotient(numerator_B: Tensor, denominator_B: Tensor) -> Tensor:
    positive_B = denominator_B != 0
    return torch.where(positive_B, numerator_B / denominator_B, 0.0)


def _check_fraction(fraction: float) -> None:
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}; it must lie above 0 and be at most 1.")


def _check_ridge(ridge: float) -> None:
    if not (math.isfinite(ridge) and ridge >= 0.0):
        raise ValueError(f"ridge is {ridge}; it must be finite and at least 0.")


def _check_centre(centre: str) -> None:
    if centre not in ("mean", "zero"):
        raise ValueError(f"centre is {centre!r}; it must be 'mean' or 'zero'.")
