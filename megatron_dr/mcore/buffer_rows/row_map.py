"""Which buffers make which rows: one matrix for every kind of row.

Each of G row groups of ranks (at least context- or expert-parallel peers) has L local buffers:
S general ones and the target's. What is known of them all together are P vectors, sums of buffers
that belong together: one for every general buffer of every row group, or with domain rows one for
every domain, and of the target one, or its two halves. With c the factor that Megatron's finalize
applies to a summed buffer (1 / data ranks, or 1 / tokens),

    row r = c sum_p mix[r, p] vector p ,   r = 0 .. M-1 general, M the target, [M+1 its halves]

and an update sum_r u_r row r multiplies vector p by sum_r u_r mix[r, p]. Only ratios to c matter;
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

from megatron_dr.mcore import constants


@dataclass(frozen=True)
class RowMap:
    """What is fixed at attach.

    Attributes:
        groups: row groups of data ranks.
        slots: general buffers of a rank: slots, or one per domain.
        target_groups: groups that run only target microbatches; 0: every group runs both.
        halves: how the target is halved: not, by neighbouring groups, or in two local buffers.
        by_domain: a row is a domain's gradient over all ranks.
        ranks: neighbouring data x context ranks of a row group.
        targets: K target sets that are kept apart, each in a local buffer of its own; then there is
            a row for each, K times what the buffers hold, and no halves.
    """

    groups: int
    slots: int
    target_groups: int = 0
    halves: Literal["none", "groups", "buffers"] = "none"
    by_domain: bool = False
    ranks: int = 1
    targets: int = 1

    @property
    def num_targets(self) -> int:
        """Buffers of a rank that hold the target alone."""
        if self.target_groups:
            return 0
        return 2 if self.halves == "buffers" else self.targets

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
        """R: rows, target or targets, and the halves' difference."""
        return self.num_rows + (self.targets if self.halves == "none" else 2)

    @property
    def num_general(self) -> int:
        """Vectors of general buffers: the first of the P."""
        return self.slots * (1 if self.by_domain else self.groups)

    @property
    def num_sums(self) -> int:
        """P."""
        halved = self.halves != "none"
        return self.num_general + (0 if self.target_groups else 2 if halved else self.targets)

    def vector(self, group: int, row: int) -> int:
        """Which of the P vectors a group's local buffer is summed into."""
        if row < self.slots:
            return row if self.by_domain else group * self.slots + row
        half = group % 2 if self.halves == "groups" else row - self.slots
        return self.num_general + half

    def members(self, row: int, context: int) -> tuple[range, int]:
        """The data ranks of a row of ranks or slots, and its slot on them.

        Args:
            context: context-parallel ranks.
        """
        group, slot = divmod(row, self.slots)
        together = max(1, self.ranks // context)
        first = (self.target_groups + group) * together
        return range(first, first + together), slot

    def summed(self, buffers_GLX: torch.Tensor) -> torch.Tensor:
        """[P, ..] of every group's local buffers [G, L, ..]."""
        places = [self.vector(g, row) for g in range(self.groups) for row in range(self.local)]
        out_PX = buffers_GLX.new_zeros(self.num_sums, *buffers_GLX.shape[2:])
        index_GL = constants.index(places, out_PX.device)
        return out_PX.index_add_(0, index_GL, buffers_GLX.flatten(0, 1))

    def mix(self, ratio: torch.Tensor, share_D: torch.Tensor | None) -> torch.Tensor:
        """mix [R, P] in float64.

        Args:
            ratio: c_t / c, what the target's summed buffers are multiplied by.
            share_D: with domain rows, each domain's share n_d / n of the step; else None.
        """
        rows = self.num_rows
        mix_RP = torch.zeros(
            self.num_vectors, self.num_sums, dtype=torch.float64, device=ratio.device
        )
        if self.by_domain:
            assert share_D is not None
            scale_D = torch.where(share_D > 0, 1.0 / share_D, 0.0)  # an absent domain: a zero row
            mix_RP[:rows, :rows] = scale_D.diag()
        else:
            first = self.target_groups * self.slots
            mix_RP[:rows, first : first + rows].fill_diagonal_(float(rows))
        whole = (
            slice(0, self.target_groups) if self.target_groups else slice(self.num_general, None)
        )
        if self.targets > 1:
            mix_RP[rows:, whole].fill_diagonal_(1.0).mul_(self.targets * ratio)
            return mix_RP
        mix_RP[rows, whole] = ratio
        if self.halves != "none":
            mix_RP[rows + 1, whole][0::2] = ratio
            mix_RP[rows + 1, whole][1::2] = -ratio
        return mix_RP
