"""Random orthonormal rows Q [K, N], one matrix per side of the weight matrices, length and epoch.

All matrices that are N long on a side share its Q, so that a model with few widths keeps few of
them. Q is a function of (side, N, K, epoch, seed) alone: nothing is kept in a checkpoint, every
rank makes the same one, and who else uses an object of this class changes nothing but time.

Why orthonormal, where Choe et al. (LoGra, arXiv 2405.13954) and the authors' code draw entries
N(0, 1/K): Q Q^T = I, so a matrix of the subspace comes back unchanged from Q^T (Q G Q'^T) Q', the
transport between two subspaces is Q' Q^T without a pseudo-inverse, and an element of the compressed
gradient is as large as one of the gradient (root mean square, on average over Q), so that Adam's
epsilon keeps its meaning.

Shape suffixes: K size of the subspace, N length of the side.
"""

from typing import Literal

import torch
from torch import Tensor

from megatron_dr.projection.sketch import key_of

Side = Literal["out", "in"]
Columns = tuple[tuple[int, int], ...]  # [start, stop) of the columns wanted, in order


class Subspaces:
    """Makes the rows, and keeps those of the epoch in use.

    :param seed: another seed, other subspaces.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._kept: dict[tuple[object, ...], Tensor] = {}

    def rows(
        self, side: Side, length: int, size: int, epoch: int, like: Tensor,
        columns: Columns | None = None,
    ) -> Tensor:  # fmt: skip
        """Q [K, N], or those of its columns, in `like`'s dtype and on its device.

        The identity where K >= N.
        """
        key = (epoch, side, length, size, like.dtype, like.device, columns)
        if key not in self._kept:
            whole_KN = self._make(side, length, size, epoch, like)
            if columns is not None:
                whole_KN = torch.cat([whole_KN[:, start:stop] for start, stop in columns], 1)
            self._kept[key] = whole_KN.to(like.dtype).contiguous()
        return self._kept[key]

    def transport(
        self, side: Side, length: int, size: int, old: int, new: int, like: Tensor
    ) -> Tensor:
        """T = Q' Q^T [K, K]: coordinates in epoch `old`'s subspace to those in epoch `new`'s."""
        key = (old, new, side, length, size, like.dtype, like.device)
        if key not in self._kept:
            first_KN = self._make(side, length, size, old, like)
            second_KN = self._make(side, length, size, new, like)
            self._kept[key] = (second_KN @ first_KN.T).to(like.dtype)
        return self._kept[key]

    def keep(self, epoch: int) -> None:
        """Forget what a step of this epoch does not need any more."""
        for key in [key for key in self._kept if key[0] != epoch]:
            del self._kept[key]

    def _make(self, side: Side, length: int, size: int, epoch: int, like: Tensor) -> Tensor:
        """Q [K, N] in at least fp32: Gram-Schmidt of Gaussian rows, so uniformly distributed.

        The numbers are drawn on the CPU, so that every kind of device has the same ones.
        """
        wide = torch.promote_types(like.dtype, torch.float32)
        if size >= length:
            return torch.eye(length, dtype=wide, device=like.device)
        key = key_of(f"meso/{side}/{length}/{size}/{epoch}/{self.seed}")
        generator = torch.Generator().manual_seed(key)
        gaussian_NK = torch.randn(length, size, generator=generator).to(like.device, wide)
        q_NK, r_KK = torch.linalg.qr(gaussian_NK)
        signed_NK: Tensor = q_NK * r_KK.diagonal().sign()  # which makes Q unique, and uniform
        return signed_NK.T
