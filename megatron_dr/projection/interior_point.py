"""Primal-dual interior point with Mehrotra's predictor-corrector, for many programs at once.

S. Mehrotra, SIAM J. Optim. 2(4), 1992; for the quadratic case: J. Nocedal and S. Wright, Numerical
Optimization, 2nd ed., section 16.6.

Shape suffixes: M rows, B blocks, P = M or 2M (bounds), C right-hand sides.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_ITERATIONS = 25  # 165,000 sampled programs, easy and hard: 18 leave a residual of 1.5e-6, 25 2e-7
_PROXIMAL = 1e-10  # pull towards the start, relative to H: one answer where the optimum is a face
_PIVOT = 1e-13  # keeps the Cholesky pivots positive; the residuals never see it
_BACKOFF = 0.995  # fraction of the way to the boundary, while far from the end
_CLOSEST = 1 - 1e-8  # and close to it, where whole steps converge faster than linearly
_GAP_DONE = 1e-16
_DUAL_DONE = 1e-12


class Problem(NamedTuple):
    """The program in v = w / unit, scaled so that H and l are of order one."""

    hessian_BMM: Tensor
    linear_BM: Tensor
    unit_BM: Tensor
    upper: float | None
    total: float | None


class _Point(NamedTuple):
    """x holds v, and upper - v beside it where there is an upper bound; m x's multipliers; nu.

    P = M or 2M. nu is the multiplier of the sum, 0 without one. Also used for directions.
    """

    x_BP: Tensor
    m_BP: Tensor
    nu_B1: Tensor


def minimiser(problem: Problem) -> Tensor:
    """v [B, M], strictly inside its bounds and feasible to rounding.

    A block stops at a gap of 1e-16, or where rounding spoils a step: there it stays put.
    """
    point = _start(problem)
    moves_B = torch.ones_like(problem.linear_BM[:, 0], dtype=torch.bool)
    for _ in range(_ITERATIONS):
        dual_BM, gap_B1 = _dual_residual(problem, point), _gap(point)
        done_B = (gap_B1[:, 0] < _GAP_DONE) & (dual_BM.abs().amax(1) < _DUAL_DONE)
        moves_B = moves_B & ~done_B
        # Looking is free on the CPU; elsewhere it would wait.
        if problem.linear_BM.device.type == "cpu" and not moves_B.any():
            break
        moved, sound_B = _iterate(problem, point, dual_BM, gap_B1)
        moves_B = moves_B & sound_B
        point = _choose(moves_B[:, None], moved, point)
    return _primal(problem, point)


def _start(problem: Problem) -> _Point:
    """Equal weights strictly inside the set; multipliers of the gradient's size."""
    upper, ones_BM = problem.upper, torch.ones_like(problem.linear_BM)
    v_BM = ones_BM if problem.total is not None or upper is None else ones_BM * (upper / 2)
    gradient_BM = times(problem.hessian_BMM, v_BM) - problem.linear_BM
    nu_B1 = -gradient_BM.mean(1, keepdim=True) * (problem.total is not None)
    size_BM = (gradient_BM + nu_B1).abs().amax(1, keepdim=True).clamp(min=0.1) * ones_BM
    if upper is None:
        return _Point(v_BM, size_BM, nu_B1)
    return _Point(torch.cat((v_BM, upper - v_BM), 1), torch.cat((size_BM, size_BM), 1), nu_B1)


def _iterate(
    problem: Problem, point: _Point, dual_BM: Tensor, gap_B1: Tensor
) -> tuple[_Point, Tensor]:
    """One predictor-corrector step, and whether it is sound [B]."""
    product_BP = point.x_BP * point.m_BP
    newton = _Newton(problem, point, dual_BM)
    (predictor,) = newton.directions(-product_BP[..., None])
    length_B1 = _length(point, predictor, 1.0)
    aim_B1 = gap_B1 * (_gap(_moved(point, predictor, length_B1)) / gap_B1) ** 3
    # A full second-order correction of a short predictor can cycle: also try it damped, and take
    # the longer step (M. Colombo and J. Gondzio, Comput. Optim. Appl. 41, 2008).
    trust_B12 = torch.stack((torch.ones_like(length_B1), length_B1**2), 2)
    second_BP1 = (predictor.x_BP * predictor.m_BP)[..., None]
    full, damped = newton.directions((aim_B1 - product_BP)[..., None] - trust_B12 * second_BP1)
    backoff_B1 = (1.0 - gap_B1).clamp(min=_BACKOFF, max=_CLOSEST)
    full_B1, damped_B1 = _length(point, full, backoff_B1), _length(point, damped, backoff_B1)
    step = _choose(damped_B1 > full_B1, damped, full)
    moved = _moved(point, step, torch.maximum(full_B1, damped_B1))
    finite_B = (moved.x_BP + moved.m_BP + moved.nu_B1).isfinite().all(1)
    return moved, finite_B & (newton.info_B == 0)


class _Newton:
    """The linearised optimality conditions at a point, factored once.

    (H + z/v + y/s) dv + dnu = -dual + lower/v - upper/s  and  sum(dv) = total - sum(v),
    with x = (v, s), m = (z, y) and (lower, upper) the wanted change of the products x m. The sum
    by the Schur complement. Then dx = (dv, -dv) and dm = (wanted - m dx)/x.
    """

    def __init__(self, problem: Problem, point: _Point, dual_BM: Tensor) -> None:
        self.problem, self.point, self.dual_BM = problem, point, dual_BM
        matrix_BMM = problem.hessian_BMM.clone()
        barrier_BM = _folded(problem, point.m_BP / point.x_BP, 1.0)
        matrix_BMM.diagonal(dim1=1, dim2=2).add_(barrier_BM + (_PROXIMAL + _PIVOT))
        self.factor_BMM, self.info_B = torch.linalg.cholesky_ex(matrix_BMM)
        if problem.total is not None:
            self.ones_BM1 = solved(self.factor_BMM, torch.ones_like(dual_BM)[..., None])
            self.excess_B1 = _primal(problem, point).sum(1, keepdim=True) - problem.total

    def directions(self, wanted_BPC: Tensor) -> list[_Point]:
        """One direction for each of the C wanted changes."""
        x_BP1, m_BP1 = self.point.x_BP[..., None], self.point.m_BP[..., None]
        pull_BMC = _folded(self.problem, wanted_BPC / x_BP1, -1.0)
        dv_BMC = solved(self.factor_BMM, pull_BMC - self.dual_BM[..., None])
        dnu_BC = torch.zeros_like(dv_BMC[:, 0])
        if self.problem.total is not None:
            dnu_BC = (dv_BMC.sum(1) + self.excess_B1) / self.ones_BM1.sum(1)
            dv_BMC = dv_BMC - dnu_BC[:, None] * self.ones_BM1
        dx_BPC = dv_BMC if self.problem.upper is None else torch.cat((dv_BMC, -dv_BMC), 1)
        dm_BPC = (wanted_BPC - m_BP1 * dx_BPC) / x_BP1
        parts = (dx_BPC.unbind(2), dm_BPC.unbind(2), dnu_BC[..., None].unbind(1))
        return [_Point(*part) for part in zip(*parts, strict=True)]


def _choose(first_B1: Tensor, first: _Point, second: _Point) -> _Point:
    return _Point(*(torch.where(first_B1, a, b) for a, b in zip(first, second, strict=True)))


def _primal(problem: Problem, point: _Point) -> Tensor:
    return point.x_BP[:, : problem.linear_BM.shape[1]]


def _folded(problem: Problem, values: Tensor, sign: float) -> Tensor:
    """Values of v's bounds [B, M, ...], plus sign times those of the upper bounds."""
    if problem.upper is None:
        return values
    below, above = values.chunk(2, dim=1)
    return below + sign * above


def _dual_residual(problem: Problem, point: _Point) -> Tensor:
    """H v - l - z + y + nu, with the proximal pull towards v = 1 (a sum) or v = 0 (the cone)."""
    v_BM, centre = _primal(problem, point), 1.0 if problem.total is not None else 0.0
    gradient_BM = times(problem.hessian_BMM, v_BM) - problem.linear_BM
    gradient_BM = gradient_BM + _PROXIMAL * (v_BM - centre)
    return gradient_BM - _folded(problem, point.m_BP, -1.0) + point.nu_B1


def _length(point: _Point, step: _Point, backoff: Tensor | float) -> Tensor:
    """The longest step in (0, 1] that keeps x and m positive, times backoff [B, 1]."""
    shrink_BP = torch.maximum(-step.x_BP / point.x_BP, -step.m_BP / point.m_BP)
    return (backoff / shrink_BP.amax(1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)


def _moved(point: _Point, step: _Point, length_B1: Tensor) -> _Point:
    return _Point(*(old + length_B1 * d for old, d in zip(point, step, strict=True)))


def _gap(point: _Point) -> Tensor:
    """Mean complementarity product [B, 1]."""
    return (point.x_BP * point.m_BP).mean(1, keepdim=True)


def solved(factor_BMM: Tensor, right_BMC: Tensor) -> Tensor:
    """(L L')^-1 b."""
    half_BMC = torch.linalg.solve_triangular(factor_BMM, right_BMC, upper=False)
    full_BMC: Tensor = torch.linalg.solve_triangular(factor_BMM.mT, half_BMC, upper=True)
    return full_BMC


def times(matrix_BMM: Tensor, vector_BM: Tensor) -> Tensor:
    """H v."""
    return torch.bmm(matrix_BMM, vector_BM[..., None])[..., 0]
