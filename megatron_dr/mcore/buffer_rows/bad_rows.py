"""What a step does with rows in gradient buffers that have NaN or Inf, as `on_bad_gradient` says.

Legend: B blocks, R = M rows and the target, P vectors of all ranks (`row_map.py`).
"""

from collections.abc import Callable
from typing import Any

import torch

from megatron_dr.mcore.buffer_rows.layout import Gram
from megatron_dr.mcore.step.bad import Bad
from megatron_dr.projection.left_out import leave_out


class BadRows:
    """Of one step.

    Args:
        mean: whether what is bad is left out; else it spoils the step, and nothing is changed.
        gram: of all rows.
        projected: blocks that are.
        rows: M.

    Attributes:
        gram_BRR: what is projected.
        seen_BRR: the same, where it tells something.
    """

    def __init__(self, mean: bool, gram: Gram, projected: int, rows: int) -> None:
        self.gram_BRR = self.seen_BRR = gram.gram_BRR[:projected]
        self._left = leave_out(self.gram_BRR, gram.finite_R, rows) if mean else None
        if self._left is not None:
            self.gram_BRR, self.seen_BRR = self._left.gram_BRR, self._left.seen_BRR
        self._bad_M, self._bad_target = ~gram.finite_R[:rows], ~gram.finite_R[rows:].all()

    def coefficients(self, of_x_BQ: torch.Tensor) -> torch.Tensor:
        """Over the rows as they are, of those over the rows that were projected on."""
        return of_x_BQ if self._left is None else self._left.coefficients(of_x_BQ)

    def share(self, of_target: torch.Tensor | float) -> torch.Tensor | float:
        """Of the target in the update."""
        return of_target if self._left is None else self._left.share(of_target)

    def vectors(self, mix_RP: torch.Tensor) -> torch.Tensor | None:
        """Which vectors are left out; None: what they hold is taken as it is."""
        return None if self._left is None else self._left.vectors(mix_RP)

    def found(self, own: Callable[[], list[Any]]) -> Bad:
        """For the optimizer."""
        any_row = self._bad_M.any()
        spoilt = self._bad_M.all() if self._left is not None else any_row | self._bad_target
        return Bad(self._bad_target, self._bad_M.sum(), spoilt, own)


def kept_apart(products_BPP: torch.Tensor) -> torch.Tensor:
    """Without the products of vectors that are not finite, so that these stay out of others'."""
    good_BP = products_BPP.diagonal(dim1=1, dim2=2).isfinite()
    return torch.where(good_BP[:, :, None] & good_BP[:, None, :], products_BPP, 0.0)
