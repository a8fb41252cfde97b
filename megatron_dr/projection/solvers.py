"""Batched convex quadratic programs on device: no host synchronisation, every block at once.

    minimise  1/2 w'Hw - l'w   subject to  0 <= w [<= upper]  [and sum(w) = sum_to]

H is a gram and may be singular, rank-deficient or zero, at any scale. Here: the scaling, the last
rounding and the residual; the method is in `interior_point`.

Shape suffixes: M rows, N elements, K sketch size, B blocks, R = M + 1 (rows plus target).
"""

import torch
from torch import Tensor

from megatron_dr.projection.interior_point import Problem, minimiser, times

_BISECTIONS = 80
_CACHE_BYTES = 2**22  # of H at a time on the CPU: the passes over it stay in the cache


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
    if upper is None or sum_to is None or upper * rows >= 2 * sum_to:
        weights_BM = _interior_point(hessian_BMM, linear_BM, upper, sum_to)
    elif upper * rows <= sum_to * (1 + 1e-12):
        weights_BM = torch.full_like(linear_BM, sum_to / rows)
    else:  # a narrow box: solve for the distance upper - w, whose start lies far from its bound
        mirrored_BM = upper * hessian_BMM.sum(2) - linear_BM
        left = upper * rows - sum_to
        weights_BM = upper - _interior_point(hessian_BMM, mirrored_BM, upper, left)
    return spoil(weights_BM, hessian_BMM, linear_BM)


def spoil(weights_BM: Tensor, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
    """NaN for the blocks whose inner products are not finite."""
    finite_B = gram_BMM.isfinite().all(2).all(1) & cross_BM.isfinite().all(1)
    return torch.where(finite_B[:, None], weights_BM, torch.nan)


def _interior_point(
    hessian_BMM: Tensor, linear_BM: Tensor, upper: float | None, sum_to: float | None
) -> Tensor:
    """The blocks are independent; the CPU takes as many at a time as its cache holds."""
    blocks, rows = linear_BM.shape
    on_cpu = linear_BM.device.type == "cpu"
    size = max(1, _CACHE_BYTES // (8 * rows**2) if on_cpu else blocks)
    pieces = [slice(first, first + size) for first in range(0, max(1, blocks), size)]
    return torch.cat([_solve(hessian_BMM[b], linear_BM[b], upper, sum_to) for b in pieces])


def _solve(
    hessian_BMM: Tensor, linear_BM: Tensor, upper: float | None, sum_to: float | None
) -> Tensor:
    problem = _normalise(hessian_BMM, linear_BM, upper, sum_to)
    weights_BM = _feasible(problem, minimiser(problem)) * problem.unit_BM
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
    gradient_BM = times(problem.hessian_BMM, v_BM) - problem.linear_BM
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
) -> Problem:
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
    return Problem(
        hessian_BMM * (unit / scale_B1[..., None]), linear_BM / scale_B1,
        torch.full_like(linear_BM, unit), None if upper is None else upper / unit,
        None if sum_to is None else float(rows),
    )  # fmt: skip


def _normalise_cone(
    hessian_BMM: Tensor, linear_BM: Tensor, diagonal_BM: Tensor, mean_B1: Tensor
) -> Problem:
    """The cone is free in every row's length: make all rows unit rows, and the target too.

    A zero row gets curvature one and no pull, hence weight zero.
    """
    zero_BM = diagonal_BM <= 1e-40 * mean_B1
    length_BM = (diagonal_BM / mean_B1).sqrt().masked_fill(zero_BM, 1.0)
    hessian_BMM = hessian_BMM / mean_B1[..., None] / length_BM[:, :, None] / length_BM[:, None, :]
    hessian_BMM = hessian_BMM + torch.diag_embed(zero_BM.double())
    linear_BM = (linear_BM / mean_B1 / length_BM).masked_fill(zero_BM, 0.0)
    target_B1 = _or_one(linear_BM.abs().amax(1, keepdim=True))
    return Problem(hessian_BMM, linear_BM / target_B1, target_B1 / length_BM, None, None)


def _feasible(problem: Problem, v_BM: Tensor) -> Tensor:
    """Remove the last rounding from the sum, in proportion to each weight's room."""
    v_BM = v_BM.clamp(min=0.0, max=problem.upper)
    if problem.total is None:
        return v_BM
    missing_B1 = problem.total - v_BM.sum(1, keepdim=True)
    above_BM = v_BM if problem.upper is None else problem.upper - v_BM
    room_BM = torch.where(missing_B1 > 0, above_BM, v_BM)
    v_BM = v_BM + room_BM * (missing_B1 / _or_one(room_BM.sum(1, keepdim=True)))
    return v_BM.clamp(min=0.0, max=problem.upper)


def _project(problem: Problem, x_BM: Tensor) -> Tensor:
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


def _or_one(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, 1.0)
