"""Batched convex quadratic programs on device: no host synchronisation, every block at once.

    minimise  1/2 w'Hw - l'w   subject to  0 <= w [<= upper]  [and sum(w) = sum_to]

H is a gram and may be singular, rank-deficient or zero, at any scale. The method is a primal-dual
interior point with Mehrotra's predictor-corrector (S. Mehrotra, SIAM J. Optim. 2(4), 1992; for the
quadratic case: J. Nocedal and S. Wright, Numerical Optimization, 2nd ed., section 16.6).

Shape suffixes: M rows, N elements, K sketch size, B blocks, R = M + 1 (rows plus target).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ITERATIONS = 30
_PROXIMAL = 1e-10  # pull towards the start, relative to H: one answer where the optimum is a face
_PIVOT = 1e-13  # keeps the Cholesky pivots positive; the residuals never see it
_BACKOFF = 0.995  # fraction of the way to the boundary
_GAP_DONE = 1e-16
_DUAL_DONE = 1e-12
_BISECTIONS = 80


class _Problem(NamedTuple):
    """The program in v = w / unit, scaled so that H and l are of order one."""

    hessian_BMM: Tensor
    linear_BM: Tensor
    unit_BM: Tensor
    upper: float | None
    total: float | None


class _Point(NamedTuple):
    """Primal v, its multipliers z (v >= 0), slack s = upper - v, its multipliers y, and nu.

    Also used for directions. Without an upper bound s = 1, y = 0; without a sum nu = 0.
    """

    v_BM: Tensor
    z_BM: Tensor
    s_BM: Tensor
    y_BM: Tensor
    nu_B1: Tensor


def solve_qp(
    hessian_BMM: Tensor, linear_BM: Tensor, *, upper: float | None, sum_to: float | None
) -> Tensor:
    """Weights w [B, M] in float64 that minimise 1/2 w'Hw - l'w over 0 <= w [<= upper], [sum].

    The result is feasible to rounding, its relative KKT residual is at most 1e-6, and it commutes
    with permutations of the rows. Where many w are optimal, the choice is the one nearest to the
    centre (equal weights with a sum, zero in the cone), so duplicate rows get equal weights.
    A block with a non-finite entry gets NaN.

    :param hessian_BMM: H, symmetric positive semidefinite, float64.
    :param linear_BM: l. Without bounds above or a sum it must lie in the range of H (as J t does).
    :param upper: upper bound of every weight, or None.
    :param sum_to: what the weights sum to, or None.
    """
    rows = linear_BM.shape[1]
    _check(rows, upper, sum_to)
    hessian_BMM, linear_BM = hessian_BMM.double(), linear_BM.double()
    finite_B = hessian_BMM.isfinite().all(2).all(1) & linear_BM.isfinite().all(1)
    if upper is None or sum_to is None or upper * rows >= 2 * sum_to:
        weights_BM = _interior_point(hessian_BMM, linear_BM, upper, sum_to)
    elif upper * rows <= sum_to * (1 + 1e-12):
        weights_BM = torch.full_like(linear_BM, sum_to / rows)
    else:  # a narrow box: solve for the distance upper - w, whose start lies far from its bound
        mirrored_BM = upper * hessian_BMM.sum(2) - linear_BM
        left = upper * rows - sum_to
        weights_BM = upper - _interior_point(hessian_BMM, mirrored_BM, upper, left)
    return torch.where(finite_B[:, None], weights_BM, torch.nan)


def _interior_point(
    hessian_BMM: Tensor, linear_BM: Tensor, upper: float | None, sum_to: float | None
) -> Tensor:
    problem = _normalise(hessian_BMM, linear_BM, upper, sum_to)
    point = _start(problem)
    for _ in range(_ITERATIONS):
        before, point = point, _iterate(problem, point)
        # Done when nothing moves. Looking is free on the CPU; elsewhere it would wait.
        if point.v_BM.device.type == "cpu" and torch.equal(point.v_BM, before.v_BM):
            break
    weights_BM = _feasible(problem, point.v_BM) * problem.unit_BM
    if sum_to is None:  # no row pulls: zero is optimal
        weights_BM = torch.where((linear_BM > 0).any(1, keepdim=True), weights_BM, 0.0)
    return weights_BM if upper is None else weights_BM.clamp(max=upper)


def kkt_residual(
    hessian: Tensor, linear: Tensor, weights: Tensor, upper: float | None, sum_to: float | None
) -> Tensor:
    """Natural residual max|v - P(v - grad f(v))| / max(1, |v|) [B]: zero iff w satisfies KKT.

    P is the Euclidean projection onto the feasible set and v the weights of the same scaled
    program that `solve_qp` solves, so scaling H, l or the rows leaves the residual.
    """
    problem = _normalise(hessian.double(), linear.double(), upper, sum_to)
    v_BM = weights.double() / problem.unit_BM
    gradient_BM = _times(problem.hessian_BMM, v_BM) - problem.linear_BM
    gap_BM = v_BM - _project(problem, v_BM - gradient_BM)
    return gap_BM.abs().amax(1) / v_BM.abs().amax(1).clamp(min=1.0)


def _check(rows: int, upper: float | None, sum_to: float | None) -> None:
    for name, value in (("upper", upper), ("sum_to", sum_to)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}; it must be positive and finite, or None.")
    if upper is not None and sum_to is not None and upper * rows < sum_to * (1 - 1e-9):
        raise ValueError(f"upper is {upper}; {rows} weights summing to {sum_to} need a higher one.")


def _normalise(
    hessian_BMM: Tensor, linear_BM: Tensor, upper: float | None, sum_to: float | None
) -> _Problem:
    """Scale rows and objective. A sum makes the part of l along the ones vector irrelevant."""
    rows = linear_BM.shape[1]
    diagonal_BM = hessian_BMM.diagonal(dim1=1, dim2=2)
    mean_B1 = _or_one(diagonal_BM.mean(1, keepdim=True))
    if upper is None and sum_to is None:
        return _normalise_cone(hessian_BMM, linear_BM, diagonal_BM, mean_B1)
    unit = sum_to / rows if sum_to is not None else upper
    assert unit is not None
    if sum_to is not None:
        linear_BM = linear_BM - linear_BM.mean(1, keepdim=True)
    scale_B1 = torch.maximum(unit * mean_B1, linear_BM.abs().amax(1, keepdim=True))
    return _Problem(
        hessian_BMM * (unit / scale_B1[..., None]),
        linear_BM / scale_B1,
        torch.full_like(linear_BM, unit),
        None if upper is None else upper / unit,
        None if sum_to is None else float(rows),
    )


def _normalise_cone(
    hessian_BMM: Tensor, linear_BM: Tensor, diagonal_BM: Tensor, mean_B1: Tensor
) -> _Problem:
    """The cone is free in every row's length: make all rows unit rows, and the target too.

    A zero row gets curvature one and no pull, hence weight zero.
    """
    zero_BM = diagonal_BM <= 1e-40 * mean_B1
    length_BM = (diagonal_BM / mean_B1).sqrt().masked_fill(zero_BM, 1.0)
    hessian_BMM = hessian_BMM / mean_B1[..., None] / length_BM[:, :, None] / length_BM[:, None, :]
    hessian_BMM = hessian_BMM + torch.diag_embed(zero_BM.double())
    linear_BM = (linear_BM / mean_B1 / length_BM).masked_fill(zero_BM, 0.0)
    target_B1 = _or_one(linear_BM.abs().amax(1, keepdim=True))
    return _Problem(hessian_BMM, linear_BM / target_B1, target_B1 / length_BM, None, None)


def _start(problem: _Problem) -> _Point:
    """Equal weights strictly inside the set; multipliers of the gradient's size."""
    upper, ones_BM = problem.upper, torch.ones_like(problem.linear_BM)
    v_BM = ones_BM if problem.total is not None or upper is None else ones_BM * (upper / 2)
    gradient_BM = _times(problem.hessian_BMM, v_BM) - problem.linear_BM
    nu_B1 = -gradient_BM.mean(1, keepdim=True) * (problem.total is not None)
    size_BM = (gradient_BM + nu_B1).abs().amax(1, keepdim=True).clamp(min=0.1) * ones_BM
    if upper is None:
        return _Point(v_BM, size_BM, ones_BM, torch.zeros_like(ones_BM), nu_B1)
    return _Point(v_BM, size_BM, upper - v_BM, size_BM, nu_B1)


def _iterate(problem: _Problem, point: _Point) -> _Point:
    """One predictor-corrector step; converged blocks and those whose step fails stay put."""
    v_BM, z_BM, s_BM, y_BM, _ = point
    matrix_BMM = problem.hessian_BMM.clone()
    matrix_BMM.diagonal(dim1=1, dim2=2).add_(z_BM / v_BM + y_BM / s_BM + (_PROXIMAL + _PIVOT))
    factor_BMM, info_B = torch.linalg.cholesky_ex(matrix_BMM)
    dual_BM = _dual_residual(problem, point)
    gap_B1 = _gap(problem, point)
    predictor = _newton(problem, point, factor_BMM, dual_BM, -v_BM * z_BM, -s_BM * y_BM)
    length_B1 = _length(problem, point, predictor, 1.0)
    trial = _moved(point, predictor, length_B1)
    aim_B1 = gap_B1 * (_gap(problem, trial) / gap_B1) ** 3
    # A full second-order correction of a short predictor can cycle: also try it damped, and keep
    # the longer step (M. Colombo and J. Gondzio, Comput. Optim. Appl. 41, 2008).
    moved, longest_B1 = point, torch.zeros_like(length_B1)
    for trust_B1 in (torch.ones_like(length_B1), length_B1**2):
        lower_BM = aim_B1 - v_BM * z_BM - trust_B1 * predictor.v_BM * predictor.z_BM
        upper_BM = aim_B1 - s_BM * y_BM - trust_B1 * predictor.s_BM * predictor.y_BM
        step = _newton(problem, point, factor_BMM, dual_BM, lower_BM, upper_BM)
        length_B1 = _length(problem, point, step, _BACKOFF)
        moved = _choose(length_B1 > longest_B1, _moved(point, step, length_B1), moved)
        longest_B1 = torch.maximum(longest_B1, length_B1)
    sound_B = (info_B == 0) & (moved.v_BM + moved.z_BM + moved.y_BM + moved.nu_B1).isfinite().all(1)
    done_B = (gap_B1[:, 0] < _GAP_DONE) & (dual_BM.abs().amax(1) < _DUAL_DONE)
    return _choose((sound_B & ~done_B)[:, None], moved, point)


def _choose(first_B1: Tensor, first: _Point, second: _Point) -> _Point:
    return _Point(*(torch.where(first_B1, a, b) for a, b in zip(first, second, strict=True)))


def _dual_residual(problem: _Problem, point: _Point) -> Tensor:
    """H v - l - z + y + nu, with the proximal pull towards v = 1 (a sum) or v = 0 (the cone)."""
    centre = 1.0 if problem.total is not None else 0.0
    gradient_BM = _times(problem.hessian_BMM, point.v_BM) - problem.linear_BM
    gradient_BM = gradient_BM + _PROXIMAL * (point.v_BM - centre)
    return gradient_BM - point.z_BM + point.y_BM + point.nu_B1


def _newton(
    problem: _Problem,
    point: _Point,
    factor_BMM: Tensor,
    dual_BM: Tensor,
    lower_BM: Tensor,
    upper_BM: Tensor,
) -> _Point:
    """Newton direction whose complementarity right-hand sides are lower and upper.

    (H + z/v + y/s) dv + dnu = -dual + lower/v - upper/s and sum(dv) = total - sum(v),
    the second by the Schur complement; then dz = (lower - z dv)/v, ds = -dv, dy alike.
    """
    v_BM, z_BM, s_BM, y_BM, nu_B1 = point
    bounded = problem.upper is not None
    right_BM = lower_BM / v_BM - dual_BM
    right_BM = right_BM - upper_BM / s_BM if bounded else right_BM
    both_BM2 = torch.stack((right_BM, torch.ones_like(right_BM)), 2)
    half_BM2 = torch.linalg.solve_triangular(factor_BMM, both_BM2, upper=False)
    both_BM2 = torch.linalg.solve_triangular(factor_BMM.mT, half_BM2, upper=True)
    dv_BM, dnu_B1 = both_BM2[..., 0], torch.zeros_like(nu_B1)
    if problem.total is not None:
        excess_B1 = v_BM.sum(1, keepdim=True) - problem.total
        ones_BM = both_BM2[..., 1]
        dnu_B1 = (dv_BM.sum(1, keepdim=True) + excess_B1) / ones_BM.sum(1, keepdim=True)
        dv_BM = dv_BM - dnu_B1 * ones_BM
    dz_BM = (lower_BM - z_BM * dv_BM) / v_BM
    still_BM = torch.zeros_like(dv_BM)
    ds_BM = -dv_BM if bounded else still_BM
    dy_BM = (upper_BM - y_BM * ds_BM) / s_BM if bounded else still_BM
    return _Point(dv_BM, dz_BM, ds_BM, dy_BM, dnu_B1)


def _length(problem: _Problem, point: _Point, step: _Point, backoff: float) -> Tensor:
    """The longest step in (0, 1] that keeps v, z, s, y positive, times backoff."""
    pairs = 2 if problem.upper is None else 4
    shrink_BM = torch.cat([-step[i] / point[i] for i in range(pairs)], 1)
    return (backoff / shrink_BM.amax(1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)


def _moved(point: _Point, step: _Point, length_B1: Tensor) -> _Point:
    return _Point(*(old + length_B1 * d for old, d in zip(point, step, strict=True)))


def _gap(problem: _Problem, point: _Point) -> Tensor:
    """Mean complementarity product [B, 1]."""
    products_BM = point.v_BM * point.z_BM
    if problem.upper is not None:
        products_BM = torch.cat((products_BM, point.s_BM * point.y_BM), 1)
    return products_BM.mean(1, keepdim=True)


def _feasible(problem: _Problem, v_BM: Tensor) -> Tensor:
    """Remove the last rounding from the sum, in proportion to each weight's room."""
    v_BM = v_BM.clamp(min=0.0, max=problem.upper)
    if problem.total is None:
        return v_BM
    missing_B1 = problem.total - v_BM.sum(1, keepdim=True)
    above_BM = v_BM if problem.upper is None else problem.upper - v_BM
    room_BM = torch.where(missing_B1 > 0, above_BM, v_BM)
    v_BM = v_BM + room_BM * (missing_B1 / _or_one(room_BM.sum(1, keepdim=True)))
    return v_BM.clamp(min=0.0, max=problem.upper)


def _project(problem: _Problem, x_BM: Tensor) -> Tensor:
    """Euclidean projection onto the set: clamp(x - shift), the shift found by bisection."""
    if problem.total is None:
        return x_BM.clamp(min=0.0, max=problem.upper)
    low_B1 = x_BM.amin(1, keepdim=True) - problem.total / x_BM.shape[1]
    high_B1 = x_BM.amax(1, keepdim=True)
    if problem.upper is not None:
        low_B1 = torch.minimum(low_B1, x_BM.amin(1, keepdim=True) - problem.upper)
    for _ in range(_BISECTIONS):
        middle_B1 = (low_B1 + high_B1) / 2
        total_B1 = (x_BM - middle_B1).clamp(min=0.0, max=problem.upper).sum(1, keepdim=True)
        low_B1 = torch.where(total_B1 > problem.total, middle_B1, low_B1)
        high_B1 = torch.where(total_B1 > problem.total, high_B1, middle_B1)
    return (x_BM - (low_B1 + high_B1) / 2).clamp(min=0.0, max=problem.upper)


def _times(matrix_BMM: Tensor, vector_BM: Tensor) -> Tensor:
    return torch.bmm(matrix_BMM, vector_BM[..., None])[..., 0]


def _or_one(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, 1.0)
