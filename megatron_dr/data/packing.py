"""Samples padded to one length, or packed into it: which share a pack, and the pack's tensors.

A sample of k tokens has k - 1 inputs, each with the next token as its label. A pack of length L
holds samples of at most L inputs together; what is left is padding, a segment of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_dr.data.order import EpochOrder
from megatron_dr.data.sample import Part

_OPEN = 32  # packs that a sample is tried in, oldest first: a sample moves by few packs


class Padded(ABC):
    """Samples as padded sequences.

    Attributes:
        sequence_length: L.
        pad: token that fills a sequence.
        attention_mask: give a causal mask [1, L, L] too, True where attention is forbidden.
        eod_mask: no loss for what follows `pad`, the end of a text; as Megatron's --eod-mask-loss.
        lengths: tokens of each sample, at most L + 1 [n].
    """

    sequence_length: int
    pad: int
    attention_mask: bool
    eod_mask = False
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @abstractmethod
    def part(self, number: int) -> Part:
        """The sample itself, cut to one token more than the sequence."""

    def masked(self, number: int) -> Part:
        """`part` with the mask that is trained with."""
        part = self.part(number)
        if not self.eod_mask:
            return part
        after = np.concatenate([[False], part.ids[:-1] == self.pad])
        return Part(part.ids, np.where(after, 0, part.mask).astype(part.mask.dtype))

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """tokens, labels, loss_mask, position_ids, each [L], padded on the right."""
        sample = padded(self.masked(number), self.sequence_length, self.pad)
        if self.attention_mask:
            sample["attention_mask"] = causal_mask(self.sequence_length)
        return sample


def first_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Places of the lengths, in packs that each sum to at most `capacity`.

    A length goes to the first open pack with room for it, else opens one; the last `_OPEN` packs
    are open.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for place, length in enumerate(lengths):
        start = max(0, len(packs) - _OPEN)
        found = next((n for n in range(start, len(packs)) if room[n] >= length), len(packs))
        if found == len(packs):
            packs.append([])
            room.append(capacity)
        packs[found].append(place)
        room[found] -= int(length)
    return packs


class PackOrder:
    """Position p of an endless stream -> the numbers of the samples in its pack.

    Each epoch packs every sample once, in the epoch's own order. It depends on the lengths, the
    capacity and the seed alone, so that every rank and every layout has the same.

    Args:
        inputs: of each sample [n].
        capacity: inputs of a pack.
    """

    def __init__(self, inputs: np.ndarray, capacity: int, seed: int) -> None:
        self._inputs, self._capacity = np.minimum(inputs, capacity), capacity
        self._order = EpochOrder(len(inputs), seed)
        self._first = [0]  # position of each epoch's first pack, as far as known
        self._epoch = -1
        self._packs: list[np.ndarray] = []

    def __getitem__(self, position: int) -> np.ndarray:
        while self._first[-1] <= position:
            self._load(len(self._first) - 1)
        epoch = int(np.searchsorted(self._first, position, side="right")) - 1
        self._load(epoch)
        return self._packs[position - self._first[epoch]]

    def packs(self, epoch: int) -> int:
        """How many packs an epoch has."""
        while len(self._first) < epoch + 2:
            self._load(len(self._first) - 1)
        return self._first[epoch + 1] - self._first[epoch]

    def _load(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        n = len(self._inputs)
        numbers = np.array([self._order[p] for p in range(epoch * n, (epoch + 1) * n)])
        packs = first_fit(self._inputs[numbers], self._capacity)
        self._packs, self._epoch = [numbers[p] for p in packs], epoch
        if epoch + 2 > len(self._first):
            self._first.append(self._first[epoch] + len(packs))


class PackedSamples:
    """Packs of a set of samples; `order` says which samples make the pack at a position.

    Args:
        numbers: of the samples that take part; None: all.
    """

    def __init__(self, parts: Padded, seed: int, numbers: np.ndarray | None = None) -> None:
        self.parts = parts
        self.numbers = np.arange(len(parts)) if numbers is None else numbers
        inputs = np.maximum(parts.lengths[self.numbers] - 1, 1)  # the last token is a label only
        self.order = PackOrder(inputs, parts.sequence_length, seed)

    def __len__(self) -> int:
        """Packs of the first epoch."""
        return self.order.packs(0)

    def origin(self, places: np.ndarray) -> str:
        """Where a pack's samples are from."""
        name = getattr(self.parts, "origin", "sample {}".format)
        return ", ".join(name(int(self.numbers[place])) for place in places)

    def __getitem__(self, places: np.ndarray) -> dict[str, torch.Tensor]:
        found = [self.parts.masked(int(self.numbers[place])) for place in places]
        return pack(found, self.parts.sequence_length, self.parts.pad)


def padded(part: Part, length: int, pad: int) -> dict[str, torch.Tensor]:
    """tokens, labels, loss_mask, position_ids, each [length], of one sample, padded right."""
    tokens = np.full(length + 1, pad, np.int64)
    tokens[: len(part.ids)] = part.ids
    loss_mask = np.zeros(length, np.float32)
    loss_mask[: max(len(part.mask) - 1, 0)] = part.mask[1:]
    whole = torch.from_numpy(tokens)
    return {
        "tokens": whole[:-1], "labels": whole[1:], "loss_mask": torch.from_numpy(loss_mask),
        "position_ids": torch.arange(length),
    }  # fmt: skip


def causal_mask(length: int) -> torch.Tensor:
    """[1, length, length], True where attention is forbidden."""
    return torch.ones(1, length, length, dtype=torch.bool).triu(1)


def pack(parts: Sequence[Part], length: int, pad: int) -> dict[str, Any]:
    """As `padded`, of several samples one after the other; no label is another sample's token.

    Besides: cu_seqlens int32 [length + 1], where each segment starts, the padding's too, filled up
    with `length`; max_seqlen int32, of the longest segment; num_packed int32, samples.
    """
    sizes = [max(len(p.ids) - 1, 1) for p in parts]
    left = length - sum(sizes)
    if left < 0:
        raise ValueError(f"{length - left} inputs don't fit into a pack of {length}.")
    if left:
        sizes.append(left)
    nothing = Part(np.empty(0, np.int32), np.empty(0, np.uint8))
    samples = [padded(p, n, pad) for p, n in zip([*parts, nothing], sizes, strict=False)]
    cu_seqlens = torch.full((length + 1,), length, dtype=torch.int32)
    cu_seqlens[0] = 0
    cu_seqlens[1 : len(sizes) + 1] = torch.tensor(sizes).cumsum(0)
    return {
        **{name: torch.cat([s[name] for s in samples]) for name in samples[0]},
        "cu_seqlens": cu_seqlens,
        "max_seqlen": torch.tensor(max(sizes), dtype=torch.int32),
        "num_packed": torch.tensor(len(parts), dtype=torch.int32),
    }
