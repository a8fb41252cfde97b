"""Supervised fine-tuning and pre-training: both roles' data from files and datasets."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron_dr.config.target import TargetConfig
from megatron_dr.config.target_sets import Named, by_name
from megatron_dr.data.order import Samples
from megatron_dr.mcore.data import datasets
from megatron_dr.mcore.say import say
from megatron_dr.mcore.seams.source import Source


class DatasetSource(Source):
    """Running text, or samples; the forward step is the training script's own."""

    def __init__(self, args: Namespace, target: TargetConfig) -> None:
        self.args, self.target = args, target

    def target_samples(self) -> Any:
        return each(self.target.target_data, self._samples, self.target)

    def validation_samples(self) -> Any:
        return each(self.target.target_valid_data, self._samples)

    def test_samples(self) -> Any:
        return each(self.target.target_test_data, self._samples)

    def _samples(self, path: str) -> Samples:
        return datasets.target_samples(self.args, path)

    def streams(self, samples: Any, micro_batch_size: int, ranks: int, chunks: int) -> list[Any]:
        return datasets.target_streams(self.args, samples, micro_batch_size, chunks, ranks)

    def datasets(self, num_samples: list[int], vp_stage: int | None) -> tuple[Any, Any, Any]:
        return datasets.general_datasets(self.args, num_samples, vp_stage)


def each(
    paths: Named[str] | None, read: Callable[[str], Any], noted: TargetConfig | None = None
) -> Any:
    """The samples of a path, or of several by name; None without one.

    Args:
        noted: the steps' target: it is said where a set's batch is more than there are.
    """
    found = {name: read(path) for name, path in by_name(paths).items()}
    for one in noted.target_sets if noted is not None and found else ():
        size = len(found[one.name])
        if one.batch > size:
            of = f" {one.name}" * bool(one.name)
            say(
                f"note: the target batch ({one.batch}) is larger than the target set{of} ({size}): "
                "samples repeat within a step"
            )
    return found.get("", found or None)
