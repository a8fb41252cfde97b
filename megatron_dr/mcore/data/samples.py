"""Sets of samples as Megatron's datasets: files, and indexed datasets with loss masks.

An indexed dataset of samples has one sample in a document, and beside PREFIX.bin and PREFIX.idx a
second one, PREFIX_loss_mask: uint8, 1 for each token that is predicted with a loss.
"""

import os
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split

from megatron_dr.data import files, indexed
from megatron_dr.data.chat import Chat
from megatron_dr.data.file_samples import FileSamples
from megatron_dr.data.identities import Identity, Sources, of_tokens
from megatron_dr.data.order import EpochOrder
from megatron_dr.data.packing import PackedSamples, Padded
from megatron_dr.data.sample import Part
from megatron_dr.data.texts import hugging_face
from megatron_dr.mcore.data import ids, vocabulary
from megatron_dr.mcore.say import say

MASK = "_loss_mask"
SampleSet = Any  # FileSamples or PreparedSamples


class PreparedSamples(Padded):
    """The samples of an indexed dataset with loss masks, read from the files as they are asked for.

    Args:
        prefix: the dataset's path without .bin and .idx.
        pad: token that fills a sequence.
        attention_mask: give a causal mask too, as `FileSamples`.
        most: the vocabulary's largest id; None: not looked at.

    Attributes:
        lengths: tokens of each sample, cut ones' after the cut [n].
        sources: which file and line each is from.

    Raises:
        ValueError: files that are missing, empty, or don't belong together, or a larger id.
    """

    def __init__(
        self, prefix: str, sequence_length: int, pad: int, attention_mask: bool = False,
        most: int | None = None,
    ) -> None:  # fmt: skip
        for path in (prefix + MASK + ".bin", prefix + ".bin"):
            if not os.path.isfile(path):
                raise ValueError(f"{path}: no such file, but its .idx is there.")
        for each in (prefix, prefix + MASK):
            indexed.check(each)
        self.sequence_length, self.pad, self.attention_mask = sequence_length, pad, attention_mask
        self._prefix = prefix
        self._tokens, self._mask = IndexedDataset(prefix), IndexedDataset(prefix + MASK)
        self.sources = Sources(prefix)
        sizes, masks = self._tokens.sequence_lengths, self._mask.sequence_lengths
        if not len(sizes):
            raise ValueError(f"{prefix}: the dataset has no samples.")
        if len(sizes) != len(masks):
            raise ValueError(
                f"{prefix}: it has {len(sizes)} samples, but {prefix}{MASK} has {len(masks)}: "
                "prepare them together."
            )
        unequal = np.flatnonzero(sizes != masks)
        if len(unequal):
            n = int(unequal[0])
            raise ValueError(
                f"{prefix}: sample {n} has {sizes[n]} tokens, but {masks[n]} in {prefix}{MASK}: "
                "prepare them together."
            )
        if len(self._tokens.document_indices) != len(sizes) + 1:
            raise ValueError(f"{prefix}: a document must be one sequence, the sample.")
        if most is not None:
            ids.check(self._tokens, prefix, most)
            ids.watch(self._tokens, prefix, most)
        self.num_cut = int((sizes > sequence_length + 1).sum())
        self.lengths = np.minimum(sizes, sequence_length + 1)

    def origin(self, number: int) -> str:
        """Its file and line, or its place in the set."""
        place = Identity(*self.sources.place(number)).place
        return place or f"{self._prefix}: sample {number}"

    def part(self, number: int) -> Part:
        length = int(self.lengths[number])
        tokens = self._tokens.get(number, length=length)
        return Part.of(tokens, self._mask.get(number, length=length))

    def identity(self, number: int) -> Identity:
        """Who the sample is."""
        hashed = of_tokens(self._tokens.get(number))
        return Identity(*self.sources.place(number), str(number), hashed)


def is_samples(path: str) -> bool:
    """Whether a path names samples, and not running text to be cut into sequences."""
    return is_file(path) or os.path.isfile(path + MASK + ".idx")


def is_file(path: str) -> bool:
    """Whether a path names a file of samples or a folder of them, not an indexed dataset."""
    folder = os.path.isdir(path) and not os.path.isfile(path + ".idx")
    return files.kind(path) is not None or folder


def chat_of(tokenizer: Any) -> Chat | None:
    """The chat template of Megatron's tokenizer, if it is one of Hugging Face with one."""
    inner = hugging_face(tokenizer)
    return Chat(inner) if inner is not None and inner.chat_template else None


def note_passed_over(path: str) -> None:
    """Say which files of a folder are not read."""
    note = files.passed_over([path])
    if note:
        say(f"note: {note}")


def open_samples(path: str, config: GPTDatasetConfig) -> SampleSet:
    """The samples of a path; those that are too long are noted.

    Raises:
        ValueError: a wrong line or file.
    """
    length, mask = config.sequence_length, config.create_attention_mask
    tokenizer = config.tokenizer
    samples: SampleSet
    if is_file(path):
        note_passed_over(path)
        samples = FileSamples(path, tokenizer, length, chat_of(tokenizer), attention_mask=mask)
    else:
        most = vocabulary.largest_id(tokenizer)
        samples = PreparedSamples(path, length, tokenizer.eod, attention_mask=mask, most=most)
    samples.eod_mask = bool(config.eod_mask_loss)
    if samples.num_cut:
        say(
            f"note: {path}: {samples.num_cut} of {len(samples)} samples are longer than "
            f"--seq-length {length} and are cut"
        )
    return samples


class SampleDataset(MegatronDataset):  # type: ignore[misc]
    """A set of samples as a part of Megatron's blends: each sample once per epoch, seeded.

    Positions beyond its length go on with the next epochs. With `config.packed`, a position is a
    pack of samples.
    """

    def __init__(
        self, dataset: SampleSet, dataset_path: str | None, indices: np.ndarray,
        num_samples: int | None, index_split: Split, config: GPTDatasetConfig,
    ) -> None:  # fmt: skip
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        self.packs: PackedSamples | None = None
        self.order = EpochOrder(max(len(indices), 1), config.random_seed)
        if config.packed and len(indices):
            self.packs = PackedSamples(dataset, config.random_seed, indices)

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: SampleSet) -> int:
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> SampleSet:
        return config.samples[dataset_path]  # read by general_datasets

    def __len__(self) -> int:
        if self.num_samples is not None:
            return int(self.num_samples)
        return len(self.indices if self.packs is None else self.packs)

    def numbers(self, position: int) -> list[int]:
        """Of the samples at a position, in the set."""
        if self.packs is not None:
            return [int(self.packs.numbers[place]) for place in self.packs.order[position]]
        return [int(self.indices[self.order[position]])]

    def origin(self, position: int) -> str:
        """Where the sample of a position, or its pack's samples, are from."""
        return ", ".join(map(self.dataset.origin, self.numbers(position)))

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        if self.packs is not None:
            return self.packs[self.packs.order[position]]
        sample: dict[str, torch.Tensor] = self.dataset[int(self.indices[self.order[position]])]
        return sample
