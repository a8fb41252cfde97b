"""What a step did, for the log: sums over blocks and windows, then over ranks."""

import torch
import torch.distributed as dist

from megatron_dr.mcore import compat
from megatron_dr.mcore.samples.places import Place
from megatron_dr.mcore.samples.weigh import Solved

_ZERO_ROW = 1e-6  # |w| relative to the block's largest that counts as none


class SampleLog:
    """Gathers what was solved in a step.

    Args:
        rows_too: whether grams hold the products of rows with rows.
    """

    def __init__(self, rows_too: bool) -> None:
        self._rows_too = rows_too
        self._solved: list[Solved] = []

    def add(self, place: Place | None, solved: Solved) -> None:
        """One solve; ranks that hold shards of a weight have the same, and with place None every
        rank of the model copy: the first one counts."""
        first = dist.get_rank(compat.model_group()) == 0 if place is None else place.is_first
        if first:
            self._solved.append(solved)

    def values(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Scalars of the whole model over the step's windows, by name (collective)."""
        sums = torch.zeros(9, dtype=torch.float64, device=device)
        by_shape: dict[torch.Size, list[Solved]] = {}
        for solved in self._solved:
            by_shape.setdefault(solved.gram_BRR.shape[1:], []).append(solved)
        for alike in by_shape.values():
            sums += _sums(
                torch.cat([s.gram_BRR for s in alike]),
                torch.cat([s.direction_BR for s in alike]),
                torch.cat([s.update_BR for s in alike]),
            )
        for group in (compat.model_group(), compat.data_group()):
            dist.all_reduce(sums, group=group)
        mean_t, mean_sq, t_sq, update_t, update_sq, rest_sq, effective, zero, count = sums
        values = {
            "dr rows": effective / count.clamp(min=1),
            "dr zero rows": zero / count.clamp(min=1),
        }
        if self._rows_too:
            values["dr cos general"] = _over(mean_t, (mean_sq * t_sq).sqrt())
            values["dr cos update"] = _over(update_t, (update_sq * t_sq).sqrt())
            values["dr residual"] = _over(rest_sq.sqrt(), t_sq.sqrt())
        return values


def _over(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def _sums(
    gram_BRR: torch.Tensor, direction_BR: torch.Tensor, update_BR: torch.Tensor
) -> torch.Tensor:
    """Inner products of mean row, target t, update u and the rest d - t; rows; blocks."""
    mean_BR, target_BR = torch.zeros_like(direction_BR), torch.zeros_like(direction_BR)
    mean_BR[:, :-1] = 1.0 / (direction_BR.shape[1] - 1)
    target_BR[:, -1] = 1.0
    rest_BR = direction_BR - target_BR
    pairs = [(mean_BR, target_BR), (mean_BR, mean_BR), (target_BR, target_BR),
             (update_BR, target_BR), (update_BR, update_BR), (rest_BR, rest_BR)]  # fmt: skip
    dots = [torch.einsum("br,brs,bs->", a, gram_BRR, b) for a, b in pairs]
    weights_BM = direction_BR[:, :-1].abs()
    square_B = weights_BM.square().sum(1)
    effective_B = torch.where(square_B > 0, weights_BM.sum(1) ** 2 / square_B, 0.0)
    zero_BM = weights_BM <= _ZERO_ROW * weights_BM.amax(1, keepdim=True)
    counts = [effective_B.sum(), zero_BM.sum().double(), dots[0].new_tensor(len(gram_BRR))]
    return torch.stack([*dots, *counts])
