"""The order in which a stream sees its data: each sample once per epoch, seeded, over ranks."""

from collections.abc import Iterator, Sized
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import default_collate


class EpochOrder:
    """Position p of an endless stream -> sample: permutation number p // n of n samples, at p % n.

    The permutation of an epoch depends on the seed and the epoch alone.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError("a stream needs at least one sample.")
        self.num_samples = num_samples
        self.seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.num_samples)
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._permutation, self._epoch = generator.permutation(self.num_samples), epoch
        return int(self._permutation[place])


class Samples(Sized, Protocol):
    def __getitem__(self, number: Any) -> dict[str, Any]: ...


class TargetStream:
    """An endless iterator over a data rank's target microbatches.

    Microbatch j of a step holds `micro_batch_size` sequences; over all data ranks a step takes
    `batch_size` consecutive positions of the epoch order, ranks side by side. Samples that have an
    `order` of their own (packs) are taken in that.

    Attributes:
        consumed: sequences taken by all data ranks together. It is the stream's place: setting it
            moves the stream there.
    """

    def __init__(
        self, samples: Samples, micro_batch_size: int, rank: int, size: int, seed: int
    ) -> None:
        self.samples = samples
        self.order = getattr(samples, "order", None) or EpochOrder(len(samples), seed)
        self.micro_batch_size, self.rank, self.size = micro_batch_size, rank, size
        self.consumed = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        first = self.consumed + self.rank * self.micro_batch_size
        numbers = [self.order[first + n] for n in range(self.micro_batch_size)]
        self.consumed += self.micro_batch_size * self.size
        parts = [_tensors(self.samples[n]) for n in numbers]
        batch: dict[str, torch.Tensor] = default_collate(parts)
        return batch

    def origins(self, consumed: int, microbatch: int) -> list[str]:
        """Where the samples of a step's microbatch are from, the step beginning at `consumed`."""
        size = self.micro_batch_size
        first = consumed + (microbatch * self.size + self.rank) * size
        numbers = [self.order[first + n] for n in range(size)]
        origin = getattr(self.samples, "origin", "sample {}".format)
        return [origin(number) for number in numbers]


def _tensors(sample: dict[str, Any]) -> dict[str, Any]:
    names = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask", "cu_seqlens",
             "max_seqlen", "num_packed", "answer_mask", "reference_log_prob")  # fmt: skip
    return {name: sample[name] for name in names if name in sample}
