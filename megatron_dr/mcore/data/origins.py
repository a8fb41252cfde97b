"""Where a step's samples are from: file and line, or the place in a prepared set."""

from argparse import Namespace
from typing import Any

from megatron.core.datasets.blended_dataset import BlendedDataset

from megatron_dr.mcore.data.domain_blend import DomainBlend
from megatron_dr.mcore.data.samples import SampleDataset


def of_general(args: Namespace, dataset: Any, microbatch: int, rank: int) -> list[str]:
    """Of a general microbatch of the step under way, by the order of Megatron's own loader; empty
    where another one reads.

    Args:
        dataset: the training set as the loader has it; None on a rank that reads none.
        rank: data-parallel.
    """
    if dataset is None or args.dataloader_type != "single":
        return []
    size = args.micro_batch_size
    first = args.consumed_train_samples + (microbatch * args.data_parallel_size + rank) * size
    return [origin for n in range(first, first + size) if (origin := _origin(dataset, n))]


def _origin(dataset: Any, number: int) -> str:
    if isinstance(dataset, BlendedDataset):
        which = int(dataset.dataset_index[number])
        return _origin(dataset.datasets[which], int(dataset.dataset_sample_index[number]))
    if isinstance(dataset, DomainBlend):
        which, number = dataset.locate(number)
        return _origin(dataset.datasets[which], number)
    if isinstance(dataset, SampleDataset):
        return dataset.origin(number)
    path = getattr(dataset, "dataset_path", None)
    return f"{path}: sequence {number}" if path else ""
