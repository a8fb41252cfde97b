"""Sets of means of subsets: which general rows are kept. Equal weights on the kept rows, 0 else.

The problem, the shapes and the rule for values that are not finite: `feasible_sets`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_dr.projection.feasible_sets import FeasibleSet
from megatron_dr.projection.solvers import spoil


@dataclass(frozen=True)
class _Selection(FeasibleSet):
    """Means of subsets, as large as `fraction` says."""

    fraction: float
    dials: ClassVar[tuple[str, ...]] = ("fraction",)

    @property
    def least_rows(self) -> float:
        """1/fraction: of fewer rows no whole row is a share."""
        return 1.0 / self.fraction


class _Share(_Selection):
    """Means of k rows, k = max(1, floor(fraction M))."""

    def kept(self, rows: int) -> int:
        """k."""
        return max(1, int(self.fraction * rows))


@dataclass(frozen=True)
class TopK(_Share):
    """W = {1_S/|S| : |S| = k}, k = max(1, floor(fraction M)), maximising c.w.

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
    """W as in `TopK`; S grows by one row at a time, k times: by the one that lowers F(S) most,

        F(S) = |J^T 1_S/k - t|^2                                            step_length = 0
        F(S) = -e sum_{i in S} c_i + e^2 sum_{i < j in S} G_ij              step_length = e > 0

    The second-order term G makes rows that repeat each other lose to rows that add something.
    Both are in the manner of GREATS (Wang, Wu, Song, Mittal, Jia, GREATS: Online Selection of
    High-Quality Data for LLM Training in Every Iteration, NeurIPS 2024), which picks a batch
    greedily by a Taylor expansion of the validation loss. The first is the nearest mean. The second
    is how the target's loss changes when a step of length e is taken along each row of S, the
    target's Hessian being taken for the identity and each row's own square left out: row i's gain
    is e c_i - e^2 sum_{j in S} G_ij, `use_second_order` of the authors of Dr. Post-Training. Their
    rows are the shares g_i/M of the mean gradient, so that their learning rate is M e. A small e
    chooses as `TopK` does, a large one avoids rows that are alike. Equal gains: the lower row wins.

    :raises ValueError: a step length that is negative or not finite.
    """

    step_length: float = 0.0
    dials = ("fraction", "step_length")
    one_row = "greedy keeps it: standard training"

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        """1/k on the rows taken. Gains are times k, or divided by e: c_i - own_i - e sum_S G_ij,
        with e = 1/k and own_i = G_ii/(2 k) where no step length is given."""
        gram_BMM, cross_BM = gram_BMM.double(), cross_BM.double()
        kept = self.kept(cross_BM.shape[1])
        length, gain_BM = self.step_length, cross_BM
        if not length:
            length, own_BM = 1.0 / kept, gram_BMM.diagonal(dim1=1, dim2=2)
            gain_BM = cross_BM - own_BM / (2 * kept)
        weights_BM = torch.zeros_like(cross_BM)
        for _ in range(kept):
            row_B1 = gain_BM.masked_fill(weights_BM > 0, -torch.inf).argmax(1, keepdim=True)
            weights_BM = weights_BM.scatter(1, row_B1, 1.0 / kept)
            picked_BM = gram_BMM.take_along_dim(row_B1[..., None], 1)[:, 0]
            gain_BM = gain_BM - length * picked_BM
        return spoil(weights_BM, gram_BMM, cross_BM)


@dataclass(frozen=True)
class Filter(_Selection):
    """Drop the floor(fraction n) most negative of the n rows with c_i < 0; W = {mean of the rest}.

    fraction = 1 drops every row that disagrees with the target. Where all M disagree no row is
    left: w = 0, and the update holds no general row at all. Equal scores: the lower row stays.
    """

    reads_rows = False
    one_row = "filter with fraction 1 drops it where it opposes the target, else keeps it"

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        """1/(rows left) on the rows left."""
        cross_BM = cross_BM.double()
        opposed_B1 = (cross_BM < 0).sum(1, keepdim=True).double()  # fp32's product may differ
        dropped_B1 = (opposed_B1 * self.fraction).floor()
        order_BM = cross_BM.sort(dim=1, descending=True, stable=True).indices
        left_B1 = cross_BM.shape[1] - dropped_B1
        place_M = torch.arange(cross_BM.shape[1], device=cross_BM.device)
        kept_BM = (place_M < left_B1).double() / left_B1.clamp(min=1.0)
        weights_BM = torch.zeros_like(cross_BM).scatter_(1, order_BM, kept_BM)
        return spoil(weights_BM, gram_BMM, cross_BM)
