"""Who the general samples of a step are: their numbers go with them from the dataset to the step.

A sample's dictionary gets one tensor more, which is taken out again before anything else sees the
batch: int64 [1, 2], the number of its corpus and its own number there, or of a pack [L, 2], a line
for each of its samples and -1 after them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset

from megatron_dr.data.identities import Identity, of_tokens
from megatron_dr.mcore.data.domain_blend import DomainBlend
from megatron_dr.mcore.data.samples import SampleDataset

KEY = "megatron_dr_named"


class Named(torch.utils.data.Dataset[Any]):
    """A training set whose samples say who they are; for the rest it is the one that it is of.

    Args:
        train: Megatron's, or one in domain order.
    """

    def __init__(self, train: BlendedDataset | DomainBlend | MegatronDataset) -> None:
        self.train = train
        self.datasets = [train] if isinstance(train, MegatronDataset) else train.datasets

    @staticmethod
    def can_name(train: Any) -> bool:
        """Whether a training set is of a kind whose samples are known."""
        return isinstance(train, (BlendedDataset, DomainBlend, MegatronDataset))

    def __getattr__(self, name: str) -> Any:
        if name == "train":  # of a copy that has nothing yet
            raise AttributeError(name)
        return getattr(self.train, name)

    def __len__(self) -> int:
        return len(self.train)

    def __getitem__(self, position: int) -> dict[str, Any]:
        sample = self.train[position]
        corpus, place = self._locate(position)
        dataset = self.datasets[corpus]
        numbers = dataset.numbers(place) if isinstance(dataset, SampleDataset) else [place]
        packed = "num_packed" in sample
        named = torch.full((len(sample["tokens"]) if packed else 1, 2), -1, dtype=torch.int64)
        named[: len(numbers), 0] = corpus
        named[: len(numbers), 1] = torch.tensor(numbers)
        return {**sample, KEY: named}

    def _locate(self, position: int) -> tuple[int, int]:
        if isinstance(self.train, BlendedDataset):  # its indices are there once it gave a sample
            found = self.train.dataset_index, self.train.dataset_sample_index
            return int(found[0][position]), int(found[1][position])
        if isinstance(self.train, DomainBlend):
            return self.train.locate(position)
        return 0, int(position)

    @property
    def corpora(self) -> list[str | None]:
        """Their paths, in the blend's order."""
        return [dataset.dataset_path for dataset in self.datasets]

    def identity(self, corpus: int, number: int) -> Identity:
        """Who a sample is.

        Raises:
            OSError: its data can't be read any more.
        """
        dataset = self.datasets[corpus]
        if isinstance(dataset, SampleDataset):
            found: Identity = dataset.dataset.identity(number)
            return found
        return Identity(id=str(number), hash=of_tokens(dataset[number]["tokens"]))

    def sources(self, corpus: int) -> dict[str, str]:
        """sha256 of the files that a corpus was prepared from."""
        known = getattr(self.datasets[corpus].dataset, "sources", None)
        return {} if known is None else known.hashes


class Noted:
    """An iterator over microbatches, without their samples' numbers: those are appended to `seen`,
    [b, 2] of a microbatch of b samples."""

    def __init__(self, batches: Iterator[Any], seen: list[torch.Tensor]) -> None:
        self._batches, self._seen = batches, seen

    def __iter__(self) -> "Noted":
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        if not isinstance(batch, dict) or KEY not in batch:
            return batch
        named_N2 = batch[KEY].flatten(0, 1)
        self._seen.append(named_N2[named_N2[:, 0] >= 0])
        return {name: value for name, value in batch.items() if name != KEY}


def noted(data: Any, seen: list[torch.Tensor]) -> Any:
    """A rank's data iterators as a schedule takes them; of several chunks' the first one that reads
    is noted, as they read the same.

    Args:
        data: an iterator, one for each chunk, or None where this rank reads none.
    """
    if not isinstance(data, list):
        return None if data is None else Noted(data, seen)
    first = next((number for number, one in enumerate(data) if one is not None), None)
    return [
        None if one is None else Noted(one, seen if number == first else [])
        for number, one in enumerate(data)
    ]
