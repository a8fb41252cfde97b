"""Batched least squares on device: with a ridge, alone or in a ball. No host synchronisation.

    minimise  1/2 v'Gv - b'v + (ridge/2) |v|^2    [subject to  v'Gv <= bound^2]

G is a gram and may be singular; b must lie in its range (as J x does). The caller scales them so
that tr(G)/M is about one.

Shape suffixes: M rows, B blocks.
"""

import torch
from torch import Tensor

from megatron_dr.projection.interior_point import solved, times

_FLOOR = 1e-10  # the least ridge in a factor: pivots stay positive whatever G's rank
_STEPS = 4
_NEWTON_STEPS = 12  # 8 were enough for 99.9 percent of spectra over fourteen decades
_TINY = 1e-100


def solve_ridge(gram_BMM: Tensor, right_BM: Tensor, ridge: float) -> Tensor:
    """v [B, M] = (G + ridge)^-1 b in float64; without a ridge the smallest of all solutions.

    Proximal point steps from v = 0, v <- v + (G + max(ridge, 1e-10))^-1 (b - (G + ridge) v), four
    with one factor (R. T. Rockafellar, SIAM J. Control Optim. 14(5), 1976). They stay in the range
    of G. Without a ridge the part along an eigenvalue g that is still missing falls by
    1e-10/(g + 1e-10) a step: to 7e-5 for g = 1e-9, to a half for g = 2e-11. So eigenvalues far
    below 1e-10 count as zero; along them rounding leaves about 1e-5 of the largest weight, which
    J^T v does not show.
    """
    factor_BMM = _factor(gram_BMM, torch.full_like(right_BM[:, :1], max(ridge, _FLOOR)))
    v_BM = torch.zeros_like(right_BM)
    for _ in range(_STEPS):
        missing_BM = right_BM - times(gram_BMM, v_BM) - ridge * v_BM
        v_BM = v_BM + solved(factor_BMM, missing_BM[..., None])[..., 0]
    return v_BM


def solve_ball(gram_BMM: Tensor, right_BM: Tensor, ridge: float, bound_B1: Tensor) -> Tensor:
    """v [B, M] of the program in the ball |v|_G <= bound, |v|_G^2 = v'Gv: feasible to rounding.

    By its KKT conditions v(s) = (s G + ridge)^-1 b, with s = 1 where that is feasible and else
    s > 1 and |v(s)|_G = bound. In G's eigenbasis |v(s)|_G^2 is a sum of beta^2/(s + kappa)^2, so
    1/|v(s)|_G is concave and increasing: Newton's iteration on 1/|v(s)|_G = 1/bound rises from
    s = 1 to the root without passing it (J. J. More and D. C. Sorensen, SIAM J. Sci. Stat.
    Comput. 4(3), 1983). With x = s v and (G + ridge/s) = L L' it is

        s <- s + |x|_G^2/|L^-1 G x|^2 (|x|_G/bound - s) .

    Scaling removes what is left of the excess; without a ridge, v(s) = v(1)/s, it is all.
    """
    bound_B1 = bound_B1.clamp(min=_TINY)
    if ridge <= _FLOOR:
        v_BM = solve_ridge(gram_BMM, right_BM, ridge)
    else:
        next_B1 = torch.ones_like(bound_B1)
        for _ in range(_NEWTON_STEPS):
            s_B1 = next_B1
            factor_BMM = _factor(gram_BMM, (ridge / s_B1).clamp(min=_FLOOR))
            x_BM = solved(factor_BMM, right_BM[..., None])[..., 0]
            pull_BM1 = times(gram_BMM, x_BM)[..., None]
            half_BM1 = torch.linalg.solve_triangular(factor_BMM, pull_BM1, upper=False)
            slope_B1 = half_BM1[..., 0].norm(dim=1, keepdim=True)
            size_B1 = _size(gram_BMM, x_BM)
            step_B1 = (size_B1 / slope_B1) ** 2 * (size_B1 / bound_B1 - s_B1)
            next_B1 = torch.where(slope_B1 > 0, s_B1 + step_B1, s_B1).clamp(min=1.0)
        v_BM = x_BM / s_B1
    return v_BM / (_size(gram_BMM, v_BM) / bound_B1).clamp(min=1.0)


def _factor(gram_BMM: Tensor, ridge_B1: Tensor) -> Tensor:
    """L [B, M, M], lower triangular, with L L' = G + ridge."""
    matrix_BMM = gram_BMM.clone()
    matrix_BMM.diagonal(dim1=1, dim2=2).add_(ridge_B1)
    factor_BMM: Tensor = torch.linalg.cholesky_ex(matrix_BMM)[0]
    return factor_BMM


def _size(gram_BMM: Tensor, v_BM: Tensor) -> Tensor:
    """|v|_G [B, 1]."""
    return (v_BM * times(gram_BMM, v_BM)).sum(1, keepdim=True).clamp(min=0.0).sqrt()
