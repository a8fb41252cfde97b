"""Packs of samples: which tokens of a microbatch are whose, on every rank.

A pack is a microbatch [s, 1, .] of several samples, one after the other. Its tokens become
[L, N, .] with N the most samples that any pack of the step has, on any rank: samples that a pack
lacks have no tokens, and padding belongs to no sample.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dr.mcore import collectives, compat
from megatron_dr.projection import per_sample

Batch = dict[str, Any]


class Packs:
    """One role's packs of a step (collective).

    Args:
        batches: this rank's, with 'cu_seqlens' and 'num_packed'; None where it reads none.
        number, length: packs, and tokens of each.

    Attributes:
        counts: samples in each pack.
        most: N, of the step; set by `agree`.
    """

    def __init__(
        self, batches: list[Batch] | None, number: int, length: int, device: torch.device
    ) -> None:
        self._sample_nT = torch.full((number, length), -1, device=device)
        for n, batch in enumerate(batches or []):
            self._sample_nT[n] = _samples_of(batch, length).to(device)
        collectives.from_first(self._sample_nT, compat.model_group())
        self.counts: list[int] = (self._sample_nT.amax(1) + 1).tolist() if number else []
        self.most = max(self.counts, default=0)
        self._index: dict[tuple[int, int], torch.Tensor] = {}

    def sums(self, pack: int, values_TH: torch.Tensor) -> torch.Tensor:
        """[N, H]: of each sample, over the tokens that this rank has of the pack."""
        sample_T = self._here(pack, len(values_TH))
        out_NH = values_TH.new_zeros(self.most + 1, *values_TH.shape[1:])  # last: of no sample
        return out_NH.index_add_(0, sample_T % (self.most + 1), values_TH)[:-1]

    def split(self, pack: int, values_T: torch.Tensor, pad: float) -> torch.Tensor:
        """[T, ...] as [L, N, ...], `pad` where a sample has fewer tokens."""
        key = (pack, len(values_T))
        if key not in self._index:
            token_T = torch.arange(len(values_T), device=values_T.device)
            sample_T = self._here(pack, len(values_T))
            self._index[key] = per_sample.by_sample(token_T, sample_T, self.most, pad=-1)
        last = values_T.new_full((1, *values_T.shape[1:]), pad)  # where the index is -1
        return torch.cat([values_T, last])[self._index[key]]

    def _here(self, pack: int, tokens: int) -> torch.Tensor:
        """Samples of the tokens: all, or a tensor-parallel rank's share of the sequence."""
        sample_T = self._sample_nT[pack]
        if tokens == len(sample_T):
            return sample_T
        rank = parallel_state.get_tensor_model_parallel_rank()
        return sample_T[rank * tokens : (rank + 1) * tokens]


def agree(roles: list[Packs], device: torch.device) -> None:
    """Give all packs of a step the same N, on all ranks (collective)."""
    most = torch.tensor(max(p.most for p in roles), device=device)
    collectives.all_reduce(most, None, dist.ReduceOp.MAX)
    for packs in roles:
        packs.most = int(most)


def sample_tokens(mask_T: torch.Tensor, batch: Batch, most: int) -> torch.Tensor:
    """Tokens with a loss of each sample [N], of a pack's mask."""
    sample_T = _samples_of(batch, len(mask_T)).to(mask_T.device)
    return mask_T.new_zeros(most + 1).index_add_(0, sample_T % (most + 1), mask_T)[:-1]


def _samples_of(batch: Batch, length: int) -> torch.Tensor:
    """Sample number of each token [T], -1 of padding.

    Raises:
        ValueError: a microbatch that is no pack.
    """
    if not {"cu_seqlens", "num_packed"} <= batch.keys() or len(batch["cu_seqlens"]) != 1:
        raise ValueError(
            "packed sample rows need microbatches of one pack each, with 'cu_seqlens' and "
            f"'num_packed', but this one has {', '.join(map(str, batch))}."
        )
    starts, number = batch["cu_seqlens"][0], int(batch["num_packed"])
    token_T = torch.arange(length, device=starts.device, dtype=starts.dtype)
    sample_T = torch.bucketize(token_T, starts[1:].contiguous(), right=True)
    return torch.where(sample_T < number, sample_T, -1)
