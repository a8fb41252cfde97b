"""A run's data and forward step where it trains on preference pairs."""

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_dr.config.dpo import PreferenceConfig
from megatron_dr.config.target import TargetConfig
from megatron_dr.config.target_sets import by_name
from megatron_dr.mcore import errors
from megatron_dr.mcore.data import datasets
from megatron_dr.mcore.data.source import each
from megatron_dr.mcore.dpo import data, reference
from megatron_dr.mcore.dpo.step import preference_step
from megatron_dr.mcore.seams.source import Source, new_folder, resumes
from megatron_dr.mcore.step.handle import Handle


class PairSource(Source):
    """DPO with data regularisation: batches count pairs.

    All pairs are read at the start, on every rank, and measured by the reference before the first
    step; a resumed run has the numbers of the run that it goes on with.
    """

    judged_by = ("target dpo loss", False)

    def __init__(self, args: Namespace, target: TargetConfig, dpo: PreferenceConfig) -> None:
        self.args, self.target, self.forward_step = args, target, partial(preference_step, dpo)
        config = datasets.dataset_config(args)
        own = (target.target_data, target.target_valid_data, target.target_test_data)
        named = [path for paths in own for path in by_name(paths).values()]
        paths = [*data.general_paths(config), *named]
        with errors.agreed():  # before the reference, for which ranks wait for one another
            self.pairs = {p: data.open_pairs(p, config) for p in dict.fromkeys(paths)}

    def target_samples(self) -> Any:
        return each(self.target.target_data, self.pairs.__getitem__, self.target)

    def validation_samples(self) -> Any:
        return each(self.target.target_valid_data, self.pairs.__getitem__)

    def test_samples(self) -> Any:
        return each(self.target.target_test_data, self.pairs.__getitem__)

    def streams(self, samples: Any, micro_batch_size: int, ranks: int, chunks: int) -> list[Any]:
        return datasets.target_streams(
            self.args, samples, micro_batch_size, chunks, ranks, everywhere=True
        )

    def begin(self, handle: Handle) -> None:
        args, every = self.args, list(self.pairs.values())
        if resumes(args):
            reference.load(Path(args.load), every)
        else:
            for pairs in every:
                pairs.reference_N2 = reference.measure(handle.model, pairs, args)
        folder = new_folder(args)
        if folder is not None:
            reference.save(folder, every)

    def datasets(self, num_samples: list[int], vp_stage: int | None) -> tuple[Any, Any, Any]:
        return data.general_datasets(self.args, num_samples, self.pairs)
