"""Token ids of an indexed dataset that the vocabulary lacks, as of another model's tokenizer.

`megatron-dr prepare` writes the largest id into its manifest, which is looked at when a run starts.
A dataset without one is read whole then, unless it is large; and of each, every sequence is looked
at as it is read.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_dr.data.encode import FORMS
from megatron_dr.mcore.data.vocabulary import largest_id

LARGE = 1 << 28  # bytes
_CHUNK = 1 << 24  # ids


class Text(GPTDataset):  # type: ignore[misc]
    """Running text, each sequence of which is looked at."""

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> IndexedDataset:
        dataset = GPTDataset.build_low_level_dataset(dataset_path, config)
        watch(dataset, dataset_path, largest_id(config.tokenizer))
        return dataset


Text.__name__ = GPTDataset.__name__  # by which Megatron finds its cached indices


def check(dataset: IndexedDataset, prefix: str, most: int) -> None:
    """Raise ValueError where the dataset is known to have a larger id than `most`."""
    found = _recorded(prefix, int(dataset.sequence_lengths.sum()))
    kind = np.dtype(dataset.index.dtype)
    path = Path(f"{prefix}.bin")
    if found is None and np.iinfo(kind).max > most and path.stat().st_size <= LARGE:
        found = _largest(np.memmap(path, kind, "r")) if path.stat().st_size else None
    if found is not None and found > most:
        raise ValueError(_refusal(prefix, found, most))


def watch(dataset: IndexedDataset, prefix: str, most: int) -> None:
    """Have it raise ValueError where a sequence that is read has a larger id."""
    read = dataset.get

    def get(*args: Any, **kwargs: Any) -> np.ndarray:
        ids: np.ndarray = read(*args, **kwargs)
        if len(ids) and (found := int(ids.max())) > most:
            raise ValueError(_refusal(prefix, found, most))
        return ids

    dataset.get = get


def _recorded(prefix: str, tokens: int) -> int | None:
    """What the manifest says, if it is of this dataset."""
    for part in (part for parts in FORMS.values() for part in parts):
        path = Path(prefix.removesuffix(part) + ".json")
        if not prefix.endswith(part) or not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["statistics"]
            of_part = found[part.removeprefix("_") or "tokens"]
            if of_part["tokens"] == tokens:
                return int(of_part["largest_id"])
        except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
            # another file of that name
            continue
    return None


def _largest(ids: np.ndarray) -> int:
    starts = range(0, len(ids), _CHUNK)
    return max(int(ids[first : first + _CHUNK].max()) for first in starts)


def _refusal(prefix: str, found: int, most: int) -> str:
    return (
        f"{prefix}.bin: it has the token id {found}, but the vocabulary's largest is {most}: "
        "prepare the data with the model's own tokenizer, or give that by --tokenizer-model."
    )
