"""Feasible sets that end a run."""

import torch
from torch import Tensor

from megatron_dr.projection import FeasibleSet


class Nowhere(FeasibleSet):
    """Its weights are no numbers, and so is what is trained by them."""

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        return torch.full_like(cross_BM, torch.nan, dtype=torch.float64)
