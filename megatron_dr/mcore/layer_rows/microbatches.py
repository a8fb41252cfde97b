"""A step's microbatches, read ahead: how many tokens each sample has, on every rank.

Weights inside a backward need the token counts of both roles before the loss is computed, and the
stages in the middle never see a loss. So a rank that has data reads the step's microbatches first
(they are token ids: small), and the first rank of each model copy tells the others the counts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore import collectives, compat
from megatron_dr.mcore.layer_rows import packs
from megatron_dr.mcore.layer_rows.packs import Packs
from megatron_dr.mcore.step.rows import Call
from megatron_dr.mcore.step.sets import read

Batch = dict[str, Any]


class Microbatches:
    """General and target microbatches of a step on this rank.

    Where the target is merged, a target microbatch is appended to each general one, as further
    samples.

    Attributes:
        merged: target samples at the end of each general microbatch; 0: they have their own.
        tokens: [num_general, samples] of each general sample, float64.
        counts: how many of the samples a general microbatch has, the first ones.
        packs: the general role's and the target's, or None.
        target_tokens: [num_target, samples] likewise.

    Raises:
        ValueError: microbatches without a loss mask, or of unequal numbers of samples.
    """

    def __init__(self, call: Call, dr: DRConfig, device: torch.device) -> None:
        general, num_general = call.schedule["data_iterator"], call.num_general
        self._sizes = sizes = (call.schedule["micro_batch_size"], call.target_size)
        self._many = isinstance(general, list)
        self._general = read(general, num_general)
        self._target = read(call.target_data, call.num_target)
        self.counts, self.packs = [sizes[0]] * num_general, None
        if dr.packed:
            self.packs = self._packs(call, device)
            self.counts = self.packs[0].counts
            sizes = (self.packs[0].most, self.packs[1].most)
        self.tokens = _counts(self._general, (num_general, sizes[0]), device)
        self.target_tokens = _counts(self._target, (call.num_target, sizes[1]), device)
        self.merged = sizes[1] if dr.target_pass == "merged" else 0

    def numbers(self, microbatch: int, ranks: Sequence[int], count: int) -> torch.Tensor:
        """Of a microbatch's samples, of these data ranks, in the step (`StepLog.width`) [M]."""
        data, b = parallel_state.get_data_parallel_world_size(), self.tokens.shape[1]
        first = [(microbatch * data + rank) * b for rank in ranks]
        return (torch.tensor(first)[:, None] + torch.arange(count)).flatten()

    def _packs(self, call: Call, device: torch.device) -> tuple[Packs, Packs]:
        read = ((self._general, call.num_general), (self._target, call.num_target))
        roles = [
            Packs(next((b for b in chunks if b is not None), None), number,
                  call.schedule["seq_length"], device)
            for chunks, number in read
        ]  # fmt: skip
        packs.agree(roles, device)
        return roles[0], roles[1]

    def iterator(self, of_target: bool = False) -> Any:
        """Fresh data iterators for one schedule call, as they were given."""
        chunks = self._target if of_target else self._general
        if self.merged:
            pairs = zip(self._general, self._target, strict=True)
            chunks = [None if g is None or t is None else
                      [self._joined(*both) for both in zip(g, t, strict=True)]
                      for g, t in pairs]  # fmt: skip
        # copies: a forward step may put its context-parallel share in the place of a tensor
        iterators = [None if b is None else iter([dict(batch) for batch in b]) for b in chunks]
        return iterators if self._many else iterators[0]

    def _joined(self, general: Batch, target: Batch) -> Batch:
        """One microbatch whose samples are the general ones, then the target's."""
        out = {}
        for name, value in general.items():
            both = zip((value, target.get(name)), self._sizes, strict=True)
            per_sample = [
                part for part, size in both
                if isinstance(part, torch.Tensor) and part.dim() > 1 and len(part) == size
            ]  # fmt: skip
            out[name] = torch.cat(per_sample) if len(per_sample) == 2 else value
        return out


def _counts(
    chunks: list[list[Batch] | None], shape: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """Tokens that count in the loss [number, samples], as the model copy's first rank read them."""
    out = torch.zeros(shape, dtype=torch.float64, device=device)
    batches = next((b for b in chunks if b is not None), [])
    for number, batch in enumerate(batches):
        if "loss_mask" not in batch:
            raise ValueError(
                "sample rows need each microbatch to be a dictionary with 'loss_mask' "
                f"[samples, tokens], but this one has {', '.join(map(str, batch))}."
            )
        mask = batch["loss_mask"]
        if "cu_seqlens" in batch and len(mask) == 1:
            out[number] = packs.sample_tokens(mask[0].to(out), batch, shape[1])
            continue
        if mask.dim() != 2 or len(mask) != shape[1]:
            raise ValueError(
                f"a microbatch's loss_mask is {list(mask.shape)}, but {shape[1]} samples are "
                "expected: [samples, tokens]."
            )
        out[number] = mask.to(out).sum(-1)
    collectives.from_first(out, compat.model_group())
    return out


def total(count: torch.Tensor) -> torch.Tensor:
    """Sum over the data-parallel ranks (not the context-parallel ones, which share samples)."""
    count = count.sum()
    collectives.all_reduce(count, parallel_state.get_data_parallel_group())
    return count
