"""Domain rows as a part of a run: what they refuse, and the order of the training set."""

import argparse
from typing import Any

from megatron_dr.data.domains import DomainPlan
from megatron_dr.mcore.data.domains import domain_names, domain_weights
from megatron_dr.mcore.refuse import Rule
from megatron_dr.mcore.seams.part import Part


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
        together = args.micro_batch_size * args.data_parallel_size
        if args.consumed_train_samples % together:
            raise ValueError(
                f"--dr-rows domain can't resume after {args.consumed_train_samples} samples, not "
                f"a multiple of --micro-batch-size x data-parallel size = {together}: resume with "
                "the sizes of the run before."
            )

    def known(self, args: argparse.Namespace) -> dict[str, Any]:
        return {"domains": domain_names(args)}

    def on_data(self, args: argparse.Namespace, train: Any) -> Any:
        from megatron_dr.mcore.data.domain_blend import by_domain

        return by_domain(args, train)
