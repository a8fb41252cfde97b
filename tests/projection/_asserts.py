"""One function per theorem that a feasible set obeys."""

import _samplers
import torch
from torch import Tensor

from megatron_dr.projection import FeasibleSet, kkt_residual


def assert_feasible(w_BM: Tensor, upper: float | None, sum_to: float | None) -> None:
    assert w_BM.dtype == torch.float64 and w_BM.isfinite().all()
    assert w_BM.min() >= 0
    if upper is not None:
        assert w_BM.max() <= upper
    if sum_to is not None:
        assert (w_BM.sum(1) - sum_to).abs().max() <= 1e-13 * sum_to


def assert_optimal(
    H_BMM: Tensor, l_BM: Tensor, w_BM: Tensor, upper: float | None, sum_to: float | None
) -> None:
    assert kkt_residual(H_BMM, l_BM, w_BM, upper, sum_to).max() <= 1e-6


def assert_optimal_in_ball(
    G_BMM: Tensor, c_BM: Tensor, w_BM: Tensor, radius: float, ridge: float
) -> None:
    """KKT in v = w - 1/M: (s G + rho) v = b with s >= 1, |v|_G <= bound, s = 1 inside.

    |v|_G itself is known to about 1e-7 where G is ill-conditioned.
    """
    scale_B1 = G_BMM.diagonal(dim1=1, dim2=2).mean(1)[:, None]
    G_BMM, mean_BM = G_BMM / scale_B1[..., None], torch.full_like(w_BM, 1 / w_BM.shape[1])
    v_BM, Gv_BM = w_BM - mean_BM, torch.einsum("bmn,bn->bm", G_BMM, w_BM - mean_BM)
    b_BM = c_BM / scale_B1 - torch.einsum("bmn,bn->bm", G_BMM, mean_BM)
    size_B = (v_BM * Gv_BM).sum(1).clamp(min=0).sqrt()
    bound_B = radius * torch.einsum("bm,bmn,bn->b", mean_BM, G_BMM, mean_BM).sqrt()
    assert (size_B <= bound_B * (1 + 1e-6)).all()
    missing_BM = b_BM - Gv_BM - ridge * v_BM  # = (s - 1) G v
    excess_B1 = (missing_BM * Gv_BM).sum(1, keepdim=True) / (Gv_BM**2).sum(1, keepdim=True)
    at_bound_B1 = size_B[:, None] >= bound_B[:, None] * (1 - 1e-6)
    missing_BM = missing_BM - torch.where(at_bound_B1, excess_B1.clamp(min=0), 0) * Gv_BM
    assert (missing_BM.norm(dim=1) <= 1e-6 * b_BM.norm(dim=1)).all()


def assert_permutes(set_: FeasibleSet, J_BMN: Tensor, t_BN: Tensor, *, atol: float) -> None:
    """Permuting the rows permutes w."""
    order = torch.randperm(J_BMN.shape[1], generator=_samplers.generator(5))
    w_BM = set_.weights(*_samplers.products(J_BMN, t_BN))
    permuted_BM = set_.weights(*_samplers.products(J_BMN[:, order], t_BN))
    assert_near(permuted_BM, w_BM[:, order], atol)


def assert_scale_free(set_: FeasibleSet, J_BMN: Tensor, t_BN: Tensor, *, atol: float) -> None:
    """Scaling rows and target by s > 0 leaves w."""
    scales = [1.0, *_samplers.SCALES]
    J_BMN, t_BN = (torch.cat([s * x for s in scales]) for x in (J_BMN, t_BN))
    first_BM, *others = set_.weights(*_samplers.products(J_BMN, t_BN)).chunk(len(scales))
    for w_BM in others:
        assert_near(w_BM, first_BM, atol)


def assert_batch_independent(
    set_: FeasibleSet, J_BMN: Tensor, t_BN: Tensor, *, atol: float
) -> None:
    """Blocks solved together and one at a time have the same weights."""
    G_BMM, c_BM = _samplers.products(J_BMN, t_BN)
    alone = [set_.weights(G_BMM[b : b + 1], c_BM[b : b + 1]) for b in range(len(G_BMM))]
    assert_near(set_.weights(G_BMM, c_BM), torch.cat(alone), atol)


def assert_symmetric(set_: FeasibleSet, J_BMN: Tensor, t_BN: Tensor, *, atol: float) -> None:
    """Row M//2 + i duplicates row i: their weights are equal."""
    half = J_BMN.shape[1] // 2
    w_BM = set_.weights(*_samplers.products(J_BMN, t_BN))
    assert_near(w_BM[:, :half], w_BM[:, half : 2 * half], atol)


def assert_returns_target(set_: FeasibleSet, J_BMN: Tensor, t_BN: Tensor, *, rtol: float) -> None:
    """Projecting a feasible target gives the target."""
    d_BN = _samplers.combine(J_BMN, set_.weights(*_samplers.products(J_BMN, t_BN)))
    assert ((d_BN - t_BN).norm(dim=1) <= rtol * t_BN.norm(dim=1)).all()


def assert_near(a_BM: Tensor, b_BM: Tensor, atol: float) -> None:
    """Equal up to atol times the largest weight of the block."""
    size_B1 = b_BM.abs().amax(1, keepdim=True).clamp(min=1e-300)
    assert a_BM.isfinite().all()
    assert ((a_BM - b_BM).abs() <= atol * size_B1).all(), ((a_BM - b_BM).abs() / size_B1).max()
