"""A run of Megatron's loop that trains on preference pairs."""

import dataclasses
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dr.config import DRConfig, TargetConfig
from megatron_dr.data.pairs import Pairs
from megatron_dr.mcore import errors
from megatron_dr.mcore.datasets import dataset_config
from megatron_dr.mcore.preferences import data, reference
from megatron_dr.mcore.preferences.step import SEQUENCES, PreferenceStep
from megatron_dr.mcore.training_run import (
    TrainingRun,
    new_folder,
    num_target_microbatches,
    resumes,
)
from megatron_dr.preference_config import PreferenceConfig


class PreferenceRun(TrainingRun):
    """DPO with data regularisation: batches count pairs.

    All pairs are read at the start, on every rank, and measured by the reference before the first
    step; a resumed run has the numbers of the run that it goes on with.
    """

    def __init__(
        self, model: list[Any], optimizer: Any, config: Any, args: Namespace, dr: DRConfig,
        target: TargetConfig, dpo: PreferenceConfig,
    ) -> None:  # fmt: skip
        self.forward_step = PreferenceStep(dpo)
        self._config = dataset_config(args)
        self.pairs: dict[str, Pairs] = {}
        paths = [*data.general_paths(self._config), target.target_data, target.target_valid_data]
        with errors.agreed():  # before the reference, for which ranks wait for one another
            for path in filter(None, paths):
                self._samples(path)
        dr = dataclasses.replace(dr, sequences=SEQUENCES)
        super().__init__(model, optimizer, config, args, dr, target)
        self._find_reference(model)

    def _find_reference(self, model: list[Any]) -> None:
        args, every = self.args, list(self.pairs.values())
        if resumes(args):
            reference.load(Path(args.load), every)
        else:
            for pairs in every:
                pairs.reference_N2 = reference.measure(model, pairs, args)
        folder = new_folder(args)
        if folder is not None:
            reference.save(folder, every)

    def datasets(self, num_samples: list[int]) -> tuple[Any, Any, Any]:
        """General train, validation and test sets."""
        return data.general_datasets(self.args, num_samples, self.pairs)

    # -- seams of TrainingRun --------------------------------------------------------------------
    def _samples(self, path: str) -> Pairs:
        if path not in self.pairs:
            self.pairs[path] = data.open_pairs(path, self._config)
        return self.pairs[path]

    def _open_training(
        self, samples: Pairs, dr: DRConfig, target: TargetConfig, num_chunks: int
    ) -> None:
        self.num_target = num_target_microbatches(self.args, dr, target)
        self.target_size = target.target_batch_size // (self.num_target * self.target_ranks)
        self.train_streams = [
            data.stream(self.args, samples, self.target_size, self.target_ranks)
            for _ in range(num_chunks)
        ]

    def _open_validation(self, path: str, num_chunks: int) -> None:
        args, size, samples = self.args, self.args.eval_micro_batch_size, self._samples(path)
        self.valid_streams = [
            data.stream(args, samples, size, args.data_parallel_size) for _ in range(num_chunks)
        ]
        self.num_valid = args.eval_global_batch_size // (size * args.data_parallel_size)

    def _step(
        self, stock: Callable[..., Any], streams: list[Any], number: int, schedule: dict[str, Any]
    ) -> Any:
        def of_sequences(**call: Any) -> Any:
            size = call["micro_batch_size"] * SEQUENCES
            return stock(**{**call, "micro_batch_size": size})

        schedule = {**schedule, "forward_step_func": self.forward_step}
        return super()._step(of_sequences, streams, number, schedule)
