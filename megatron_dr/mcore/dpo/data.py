"""Preference pairs from files and prepared datasets, and both roles' data made of them."""

import argparse
import os
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

from megatron_dr.data.encode import FORMS
from megatron_dr.data.identities import Identity, Sources
from megatron_dr.data.pairs import FilePairs, Pair, Pairs
from megatron_dr.mcore.data import datasets
from megatron_dr.mcore.data.samples import (
    MASK,
    PreparedSamples,
    SampleDataset,
    chat_of,
    is_file,
    note_passed_over,
)  # fmt: skip
from megatron_dr.mcore.data.vocabulary import largest_id


class PreparedPairs(Pairs):
    """The pairs of PREFIX_chosen and PREFIX_rejected, read as they are asked for.

    Raises:
        ValueError: as `Pairs` and `PreparedSamples`, or sides of unequal size.
    """

    def __init__(
        self, prefix: str, sequence_length: int, pad: int, attention_mask: bool = False,
        most: int | None = None,
    ) -> None:  # fmt: skip
        whole = 2**30  # pairs are refused, not cut
        self._sides = [
            PreparedSamples(prefix + end, whole, pad, most=most) for end in FORMS["preference"]
        ]
        chosen, rejected = map(len, self._sides)
        if chosen != rejected:
            raise ValueError(
                f"{prefix}: it has {chosen} chosen and {rejected} rejected answers: prepare them "
                "together."
            )
        self._prefix, self.sources = prefix, Sources(prefix)
        super().__init__(prefix, sequence_length, pad, attention_mask)

    def __len__(self) -> int:
        return len(self._sides[0])

    def pair(self, number: int) -> Pair:
        chosen, rejected = (side.part(number) for side in self._sides)
        return chosen, rejected

    def origin(self, number: int) -> str:
        return f"{self._prefix}: pair {number}"

    def identity(self, number: int) -> Identity:
        hashed = f"tokens:{self.keys[number].hex()}"
        return Identity(*self.sources.place(number), str(number), hashed)


def open_pairs(path: str, config: GPTDatasetConfig) -> Pairs:
    """The pairs of a path, the same on every rank.

    Raises:
        ValueError: no such data, or a pair that can't be trained on.
    """
    length, mask, tokenizer = config.sequence_length, config.create_attention_mask, config.tokenizer
    if is_file(path):
        note_passed_over(path)
        return FilePairs(path, tokenizer, length, chat_of(tokenizer), attention_mask=mask)
    missing = next(
        (p for end in FORMS["preference"] for p in (path + end, path + end + MASK)
         if not os.path.isfile(p + ".idx")), None
    )  # fmt: skip
    if missing is not None:
        raise ValueError(
            f"{path}: no preference pairs there (no {missing}.idx): name a file of records with "
            "'chosen' and 'rejected', or the prefix of a prepared preference dataset."
        )
    most = largest_id(tokenizer)
    return PreparedPairs(path, length, tokenizer.eod, attention_mask=mask, most=most)


def general_paths(config: GPTDatasetConfig) -> list[str]:
    """The paths of the general data, each once.

    Raises:
        ValueError: none.
    """
    paths = list(dict.fromkeys(datasets.blended_paths(config)))
    if not paths:
        raise ValueError("no general data: give --data-path or --train-data-path.")
    return paths


def general_datasets(
    args: argparse.Namespace, num_samples: list[int], pairs: dict[str, Pairs]
) -> tuple[Any, Any, Any]:
    """Train, validation and test sets of the general role, blended as Megatron blends them.

    Every rank reads them, and none is told of a microbatch by another.

    Args:
        pairs: by path.

    Raises:
        ValueError: a split without pairs, or what `datasets.settle_validation` refuses.
    """
    config = datasets.dataset_config(args)
    config.samples = pairs
    datasets.check_splits(config, num_samples)
    builder = BlendedMegatronDatasetBuilder(SampleDataset, num_samples, lambda: True, config)
    train, valid, test = (part if part is None or len(part) else None for part in builder.build())
    datasets.settle_validation(args, valid, test)
    return train, valid, test
