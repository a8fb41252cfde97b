"""The general training set in an order in which a microbatch is of one domain."""

import argparse
from typing import Any

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset

from megatron_dr.data.domains import DomainPlan
from megatron_dr.mcore import compat
from megatron_dr.mcore.data.domains import domain_weights
from megatron_dr.mcore.data.samples import SampleDataset


class DomainBlend(torch.utils.data.Dataset[Any]):
    """Training samples in an order in which Megatron's sampler makes microbatches of one domain.

    Its MegatronPretrainingSampler gives rank r of D, at microbatch m of the run, the samples
    i = (m D + r) u + j, j = 0..u-1, u the microbatch size. With P peers, q = i // (P u) is
    m D/P + r // P: the plan's unit. Sample i is

        number P u count_before(q) + i mod (P u)   of domain(q),

    so that a domain's samples are taken in its own order, each once.

    Args:
        datasets: one per domain, in the plan's order.
        unit_size: P u, samples in a unit.
        size: samples in all.
    """

    def __init__(
        self, datasets: list[MegatronDataset], plan: DomainPlan, unit_size: int, size: int
    ) -> None:
        self.datasets, self.plan, self.unit_size, self.size = datasets, plan, unit_size, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        unit, place = divmod(position, self.unit_size)
        dataset = self.datasets[self.plan.domain(unit)]
        number = self.unit_size * self.plan.count_before(unit) + place
        if not isinstance(dataset, SampleDataset):  # built for its share, give or take a unit
            number %= len(dataset)
        sample: dict[str, torch.Tensor] = dataset[number]
        return sample


def by_domain(args: argparse.Namespace, train: Any) -> DomainBlend | None:
    """Megatron's blended training set in domain order; None where this rank reads none.

    Raises:
        ValueError: it is no blend.
    """
    if train is None:
        return None
    if not isinstance(train, BlendedDataset):
        raise ValueError("--dr-rows domain needs Megatron's blend of corpora: give --data-path.")
    unit_size = args.micro_batch_size * compat.data_ranks_per_row()
    plan = DomainPlan(domain_weights(args))
    return DomainBlend(train.datasets, plan, unit_size, len(train))
