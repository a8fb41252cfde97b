"""Rows with NaN or Inf left out of a step, whichever they are: no size depends on how many.

With the M' good ones of the M rows, in place of each bad row stands the mean of the good ones,

    x = S g ,    x_i = g_i of a good row, 1/M' sum over the good j of g_j of a bad one

so the rows' mean is the good rows' mean, and what hull, cone and span hold is what the good rows
alone do. (A set that counts rows, as `topk`, counts M.) Coefficients u over x are S^T u over g: 0
for a bad row, whose share the good ones have alike. A target that is bad has no part at all: then u
is the rows' mean, whatever the set. With no bad row nothing is touched, to the last bit.

Shape suffixes: M rows, B blocks, R = M rows, t and, where it is halved, its halves' difference.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LeftOut:
    """Of one step.

    Attributes:
        gram_BRR: of x and the target, finite; a bad target's products are 0.
        seen_BRR: the same, but a bad target's products are NaN: they tell nothing.
        bad_target: whether it has no part.
        bad_R: which are left out.
        rows_RR: S, and 1 for the target.
    """

    gram_BRR: Tensor
    seen_BRR: Tensor
    bad_target: Tensor
    bad_R: Tensor
    rows_RR: Tensor

    def coefficients(self, of_x_BQ: Tensor) -> Tensor:
        """Over g and t, of those over x and t [B, M + 1]."""
        size = of_x_BQ.shape[1]
        mean_BQ = torch.full_like(of_x_BQ, 1.0 / (size - 1))
        mean_BQ[:, -1] = 0.0
        chosen_BQ = torch.where(self.bad_target, mean_BQ, of_x_BQ)
        of_g_BQ = chosen_BQ @ self.rows_RR[:size, :size]
        return torch.where(self.bad_R.any(), of_g_BQ, of_x_BQ)

    def share(self, of_target: Tensor | float) -> Tensor | float:
        """Of the target in the update: none of a bad one."""
        if isinstance(of_target, float) and of_target == 0.0:
            return 0.0
        none = torch.zeros_like(self.rows_RR[0, 0])
        return torch.where(self.bad_target, none, of_target)

    def vectors(self, mix_RP: Tensor) -> Tensor:
        """Which of the P vectors that the rows are made of are left out [P]."""
        return (self.bad_R.to(mix_RP.dtype) @ (mix_RP != 0).to(mix_RP.dtype)) > 0


def leave_out(gram_BRR: Tensor, finite_R: Tensor, rows: int) -> LeftOut:
    """Of a gram whose products with what is not finite may be anything.

    :param finite_R: of each row, the target and its halves' difference.
    :param rows: M. Where none is finite all of S is 0: there is no step to take.
    """
    whole = finite_R[rows:].all()
    good_R = torch.cat([finite_R[:rows], whole.expand(len(finite_R) - rows)])
    share_R = good_R.to(gram_BRR.dtype)
    rows_RR = share_R.diag()
    mean_M = share_R[:rows] / share_R[:rows].sum().clamp(min=1.0)
    rows_RR[:rows, :rows] += (1.0 - share_R[:rows])[:, None] * mean_M
    clean_BRR = torch.where(good_R[:, None] & good_R, gram_BRR, 0.0)
    made_BRR = torch.where(good_R.all(), gram_BRR, rows_RR @ clean_BRR @ rows_RR.T)
    is_row_R = torch.arange(len(finite_R), device=finite_R.device) < rows
    known_RR = whole | (is_row_R[:, None] & is_row_R)
    seen_BRR = torch.where(known_RR, made_BRR, torch.nan)
    return LeftOut(made_BRR, seen_BRR, ~whole, ~good_R, rows_RR)
