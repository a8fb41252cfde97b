"""Domain rows as a part of a run, with a training set whose microbatches are of one domain."""

import argparse
from typing import Any

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset

from megatron_dr.data.domains import DomainPlan, Order
from megatron_dr.mcore import compat
from megatron_dr.mcore.data.domains import domain_names, domain_weights
from megatron_dr.mcore.data.samples import SampleDataset
from megatron_dr.mcore.refuse import Rule
from megatron_dr.mcore.seams.part import Part


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
        self, datasets: list[MegatronDataset], plan: Order, unit_size: int, size: int
    ) -> None:
        self.datasets, self.plan, self.unit_size, self.size = datasets, plan, unit_size, size

    def __len__(self) -> int:
        return self.size

    def locate(self, position: int) -> tuple[int, int]:
        """Number of the dataset that a sample is of, and its own there."""
        unit, place = divmod(position, self.unit_size)
        domain = self.plan.domain(unit)
        number = self.unit_size * self.plan.count_before(unit) + place
        if not isinstance(self.datasets[domain], SampleDataset):  # built for its share, give or
            number %= len(self.datasets[domain])  # take a unit
        return domain, number

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        domain, number = self.locate(position)
        sample: dict[str, torch.Tensor] = self.datasets[domain][number]
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


class DomainPart(Part):
    """--dr-rows domain: a row is a general corpus."""

    flag = "--dr-rows domain"
    refused = (
        Rule(
            "dataloader_type",
            when=lambda kind, _: kind not in (None, "single"),
            says="--dr-rows domain needs samples in order, which {flag} {value} does not give: "
            "drop that flag.",
        ),
        Rule(
            "phase_transition_iterations",
            says="--dr-rows domain counts microbatches over the whole run, and {flag} starts the "
            "data anew: drop that flag.",
        ),
    )

    def of(self, args: argparse.Namespace) -> bool | None:
        return getattr(args, "dr_rows", None) == "domain" or None

    def settle(self, own: Any, args: argparse.Namespace) -> None:
        domain_names(args)
        DomainPlan(domain_weights(args))

    def resume(self, own: Any, args: argparse.Namespace, before: argparse.Namespace) -> None:
        together = args.micro_batch_size * args.data_parallel_size
        if before.consumed_train_samples % together and not args.skip_train:
            raise ValueError(
                f"--dr-rows domain can't resume after {before.consumed_train_samples} samples, not "
                f"a multiple of --micro-batch-size x data-parallel size = {together}: resume with "
                "the sizes of the run before."
            )

    def known(self, args: argparse.Namespace) -> dict[str, Any]:
        return {"domains": domain_names(args)}

    def on_data(self, args: argparse.Namespace, train: Any) -> Any:
        return by_domain(args, train)
