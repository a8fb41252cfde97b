"""Supervised fine-tuning and pre-training: both roles' data from files and datasets."""

from argparse import Namespace
from typing import Any

from megatron_dr.config.target import TargetConfig
from megatron_dr.data.order import Samples
from megatron_dr.mcore.data import datasets
from megatron_dr.mcore.say import say
from megatron_dr.mcore.seams.source import Source


class DatasetSource(Source):
    """Running text, or samples; the forward step is the training script's own."""

    def __init__(self, args: Namespace, target: TargetConfig) -> None:
        self.args, self.target = args, target

    def target_samples(self) -> Samples | None:
        found = self._samples(self.target.target_data)
        return None if found is None else noted(found, self.target)

    def validation_samples(self) -> Samples | None:
        return self._samples(self.target.target_valid_data)

    def test_samples(self) -> Samples | None:
        return self._samples(self.target.target_test_data)

    def _samples(self, path: str | None) -> Samples | None:
        return None if path is None else datasets.target_samples(self.args, path)

    def streams(self, samples: Any, micro_batch_size: int, ranks: int, chunks: int) -> list[Any]:
        return datasets.target_streams(self.args, samples, micro_batch_size, chunks, ranks)

    def datasets(self, num_samples: list[int], vp_stage: int | None) -> tuple[Any, Any, Any]:
        return datasets.general_datasets(self.args, num_samples, vp_stage)


def noted[S: Samples](samples: S, target: TargetConfig) -> S:
    """The samples; it is said where a batch is more than there are."""
    if target.target_batch_size > len(samples):
        say(
            f"note: the target batch ({target.target_batch_size}) is larger than the target set "
            f"({len(samples)}): samples repeat within a step"
        )
    return samples
