"""Sets of means of subsets: which general rows are kept. Equal weights on the kept rows, 0 else.

The problem, the shapes and the rule for values that are not finite: `feasible_sets`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dr.projection.feasible_sets import FeasibleSet
from megatron_dr.projection.solvers import spoil


@dataclass(frozen=True)
class _Selection(FeasibleSet):
    """Means of subsets, as large as `fraction` says."""

    fraction: float
    dials = ("fraction",)


class _Share(_Selection):
    """Means of k rows, k = max(1, round(fraction M))."""

    def kept(self, rows: int) -> int:
        """k."""
        return max(1, round(self.fraction * rows))

    @property
    def least_rows(self) -> float:
        """1/fraction, where k is 1."""
        return 1.0 / self.fraction


@dataclass(frozen=True)
class TopK(_Share):
    """W = {1_S/|S| : |S| = k}, k = max(1, round(fraction M)), maximising c.w.

    First-order data selection: the projection's linear part. Equal scores: the lower row wins.
    """

    reads_rows = False
    by_score = True
    one_row = "topk keeps it: standard training"

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        """1/k on the k rows with the largest c."""
        cross_BM = cross_BM.double()
        kept = self.kept(cross_BM.shape[1])
        order_BM = cross_BM.sort(dim=1, descending=True, stable=True).indices
        weights_BM = torch.zeros_like(cross_BM).scatter_(1, order_BM[:, :kept], 1.0 / kept)
        return spoil(weights_BM, gram_BMM, cross_BM)


@dataclass(frozen=True)
class Greedy(_Share):
    """W as in `TopK`; S grows by the row that lowers |J^T 1_S/k - t|^2 most, k times.

    The second-order term G makes rows that repeat each other lose to rows that add something.
    In the manner of GREATS (Wang, Wu, Song, Mittal, Jia, GREATS: Online Selection of High-Quality
    Data for LLM Training in Every Iteration, NeurIPS 2024), which picks a batch greedily by a
    Taylor expansion of the validation loss. Equal gains: the lower row wins.
    """

    one_row = "greedy keeps it: standard training"

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        """1/k on the rows taken; row i's gain is c_i/k - (G_ii + 2 sum_{j in S} G_ij)/(2 k^2)."""
        gram_BMM, cross_BM = gram_BMM.double(), cross_BM.double()
        kept = self.kept(cross_BM.shape[1])
        gain_BM = cross_BM - gram_BMM.diagonal(dim1=1, dim2=2) / (2 * kept)  # k times the gain
        weights_BM = torch.zeros_like(cross_BM)
        for _ in range(kept):
            row_B1 = gain_BM.masked_fill(weights_BM > 0, -torch.inf).argmax(1, keepdim=True)
            weights_BM = weights_BM.scatter(1, row_B1, 1.0 / kept)
            picked_BM = gram_BMM.take_along_dim(row_B1[..., None], 1)[:, 0]
            gain_BM = gain_BM - picked_BM / kept
        return spoil(weights_BM, gram_BMM, cross_BM)


@dataclass(frozen=True)
class Filter(_Selection):
    """Drop the round(fraction n) most negative of the n rows with c_i < 0; W = {mean of the rest}.

    fraction = 1 drops every row that disagrees with the target. Where all M disagree no row is
    left: w = 0, and the update holds no general row at all. Equal scores: the lower row stays.
    """

    reads_rows = False
    one_row = "filter keeps it where it agrees with the target, else drops it"

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        """1/(rows left) on the rows left."""
        cross_BM = cross_BM.double()
        dropped_B1 = ((cross_BM < 0).sum(1, keepdim=True) * self.fraction).round()
        order_BM = cross_BM.sort(dim=1, descending=True, stable=True).indices
        left_B1 = cross_BM.shape[1] - dropped_B1
        place_M = torch.arange(cross_BM.shape[1], device=cross_BM.device)
        kept_BM = (place_M < left_B1).double() / left_B1.clamp(min=1.0)
        weights_BM = torch.zeros_like(cross_BM).scatter_(1, order_BM, kept_BM)
        return spoil(weights_BM, gram_BMM, cross_BM)
