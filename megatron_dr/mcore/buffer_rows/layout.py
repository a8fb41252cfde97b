"""Who takes part in a projection: fixed at attach. And what a gram is, however it was made."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dr.mcore import compat
from megatron_dr.mcore.buffer_rows.row_map import RowMap
from megatron_dr.projection import UNPROJECTED


@dataclass(frozen=True)
class Layout:
    """Blocks and rows of the whole model, from one rank's point of view.

    Attributes:
        names: of the B blocks; one that is not projected is the last.
        blocks: block number of each of this rank's parameters.
        row_map: which buffers make which rows.
    """

    names: tuple[str, ...]
    blocks: tuple[int, ...]
    row_map: RowMap

    @property
    def group(self) -> int:
        """This rank's row group."""
        return dist.get_rank(compat.data_group()) // self.row_map.ranks

    @property
    def projected(self) -> int:
        """How many blocks are projected, the first ones."""
        return len(self.names) - (UNPROJECTED in self.names)

    def of_all_blocks(self, update_BR: torch.Tensor) -> torch.Tensor:
        """Coefficients of those that are projected, and the rows' mean for one that is not."""
        mean_BR = torch.full_like(update_BR[:1], 1.0 / self.row_map.num_rows)
        mean_BR[:, -1] = 0.0
        return torch.cat([update_BR, mean_BR])[: len(self.names)]

    def own_blocks(self) -> slice:
        """The blocks that this rank answers for among its model-parallel peers."""
        group = compat.model_group()
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        each = -(-len(self.names) // size)
        return slice(min(rank * each, len(self.names)), min((rank + 1) * each, len(self.names)))


@dataclass
class Gram:
    """Inner products of a step's rows, the target and, where asked for, its halves' difference.

    Attributes:
        gram_BRR: float64, the same on every rank.
        error_sq_B: estimated squared Frobenius error of a sketched gram; None where it is exact.
        finite_R: whether each is finite; products with one that is not are NaN.
    """

    gram_BRR: torch.Tensor
    finite_R: torch.Tensor
    error_sq_B: torch.Tensor | None


def not_finite(mix_RP: torch.Tensor, buffers_PN: torch.Tensor) -> torch.Tensor:
    """[.., R]: above 0 for a row that is made of a buffer with NaN or Inf, else 0.

    Multiplying by the matrix would not tell: zero times NaN is NaN.
    """
    bad_P = (~buffers_PN.isfinite()).any(-1)
    return bad_P.to(mix_RP.dtype) @ (mix_RP != 0).to(mix_RP.dtype).T
