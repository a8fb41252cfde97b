"""Which buffers make which rows: one matrix for every kind of row.

Each row group of ranks (context- or expert-parallel peers count as one) has L local buffers; all
groups together have P = groups x L, numbered group by group. With c the factor that Megatron's
finalize applies to a summed buffer (1 / data ranks, or 1 / tokens),

    row r = c sum_p mix[r, p] buffer p ,   r = 0 .. M-1 general, M the target, [M+1 its halves]

and an update sum_r u_r row r multiplies buffer p by sum_r u_r mix[r, p]. Only ratios to c matter;
c itself is left to Megatron.

| rows | row r is |
|---|---|
| rank, slot | M c (the sum over its microbatches): the mean of the rows is Megatron's gradient |
| domain | c n / n_d (the sum over all ranks' microbatches of domain d): its own mean gradient |

n counts microbatches, or tokens where the loss is normalised per token: then a rank or slot with
more tokens has a longer row, as it has a larger part in Megatron's gradient.

The halves row is e = (t_A - t_B) / 2 with t = (t_A + t_B) / 2; see `projection/alpha.py`.
"""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class RowMap:
    """What is fixed at attach.

    Attributes:
        groups: row groups of data ranks.
        slots: general buffers of a rank: slots, or one per domain.
        target_groups: groups that run only target microbatches; 0: every group runs both.
        halves: how the target is halved: not, by neighbouring groups, or in two local buffers.
        by_domain: a row is a domain's gradient over all ranks.
    """

    groups: int
    slots: int
    target_groups: int = 0
    halves: Literal["none", "groups", "buffers"] = "none"
    by_domain: bool = False

    @property
    def num_targets(self) -> int:
        """Buffers of a rank that hold the target alone."""
        if self.target_groups:
            return 0
        return 2 if self.halves == "buffers" else 1

    @property
    def local(self) -> int:
        """L."""
        return self.slots + self.num_targets

    @property
    def num_rows(self) -> int:
        """M."""
        if self.by_domain:
            return self.slots
        return (self.groups - self.target_groups) * self.slots

    @property
    def num_vectors(self) -> int:
        """R: rows, target, and the halves' difference."""
        return self.num_rows + (1 if self.halves == "none" else 2)

    def mix(self, ratio: torch.Tensor, share_D: torch.Tensor | None) -> torch.Tensor:
        """mix [R, P] in float64.

        Args:
            ratio: c_t / c, what the target's summed buffers are multiplied by.
            share_D: with domain rows, each domain's share n_d / n of the step; else None.
        """
        rows, local = self.num_rows, self.local
        mix_RGL = torch.zeros(
            self.num_vectors, self.groups, local, dtype=torch.float64, device=ratio.device
        )
        if self.by_domain:
            assert share_D is not None
            scale_D = torch.where(share_D > 0, 1.0 / share_D, 0.0)  # an absent domain: a zero row
            mix_RGL[:rows, :, : self.slots] = torch.diag_embed(scale_D)[:, None, :]
        else:
            general = torch.eye(rows, dtype=torch.float64, device=ratio.device) * float(rows)
            mix_RGL[:rows, self.target_groups :, : self.slots] = general.view(rows, -1, self.slots)
        target = mix_RGL[rows]
        if self.target_groups:
            target[: self.target_groups, 0] = ratio
        else:
            target[:, self.slots :] = ratio
        if self.halves == "groups":
            mix_RGL[rows + 1, 0::2] = target[0::2]
            mix_RGL[rows + 1, 1::2] = -target[1::2]
        elif self.halves == "buffers":
            mix_RGL[rows + 1, :, self.slots] = ratio
            mix_RGL[rows + 1, :, self.slots + 1] = -ratio
        return mix_RGL.flatten(1)
