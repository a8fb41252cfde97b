"""Rows with a property known by construction, and targets inside a set by construction.

Shape suffixes: M rows, N elements, K sketch size, B blocks, R = M + 1 (rows plus target).
"""

import torch
from torch import Tensor

SCALES = [1e-20, 1.0, 1e20]
KINDS = ["generic", "rank_deficient", "zero_row", "duplicate_rows", "ill_conditioned", "common"]
TARGETS = ["outside", "in_hull", "in_cone", "in_span", "opposite"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def rows(kind: str, blocks: int, count: int, *, seed: int = 0, elements: int = 0) -> Tensor:
    """J [B, M, N]; N is M/2 + 2 unless told, so that G is singular for M > 4.

    rank_deficient: a product through three dimensions. zero_row: row 0 is zero. duplicate_rows:
    row M//2 + i equals row i. ill_conditioned: elements' scales fall to 1e-6, so G's condition
    number is about 1e12. common: a hundred times more common than own gradient.
    """
    J_BMN = normal(blocks, count, elements or count // 2 + 2, seed=seed)
    if kind == "rank_deficient":
        J_BMN = normal(blocks, count, 3, seed=seed + 1) @ normal(
            blocks, 3, J_BMN.shape[2], seed=seed + 2
        )
    elif kind == "zero_row":
        J_BMN[:, 0] = 0
    elif kind == "duplicate_rows":
        J_BMN[:, count // 2 : 2 * (count // 2)] = J_BMN[:, : count // 2]
    elif kind == "ill_conditioned":
        J_BMN = J_BMN * torch.logspace(0, -6, J_BMN.shape[2], dtype=torch.float64)
    elif kind == "common":
        J_BMN = J_BMN + 100 * normal(blocks, 1, J_BMN.shape[2], seed=seed + 3)
    return J_BMN


def target(kind: str, J_BMN: Tensor, *, seed: int = 0) -> Tensor:
    """t [B, N]: J^T w with w in the simplex, in the cone, anywhere; minus the mean; or generic."""
    blocks, count, elements = J_BMN.shape
    w_BM = normal(blocks, count, seed=seed + 10)
    if kind == "outside":
        return normal(blocks, elements, seed=seed + 11) * J_BMN.abs().mean((1, 2))[:, None]
    if kind == "opposite":
        return -J_BMN.mean(1)
    if kind == "in_hull":
        w_BM = w_BM.abs() / w_BM.abs().sum(1, keepdim=True)
    elif kind == "in_cone":
        w_BM = 3 * w_BM.clamp(min=0)
    return combine(J_BMN, w_BM)


def combine(J_BMN: Tensor, w_BM: Tensor) -> Tensor:
    return torch.einsum("bmn,bm->bn", J_BMN, w_BM)


def products(J_BMN: Tensor, t_BN: Tensor) -> tuple[Tensor, Tensor]:
    """G and c."""
    return J_BMN @ J_BMN.mT, torch.einsum("bmn,bn->bm", J_BMN, t_BN)
