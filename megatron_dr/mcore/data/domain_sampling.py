"""--dr-domain-sampling: what is read of each corpus follows its row's weight, between bounds.

With interval I, steps s I + 1 .. (s + 1) I of the run are a segment, in which shares stay. When
segment s begins, the shares of segment s + 1 are made of the weights averaged so far, which are
those of the steps before s. So every rank knows I steps ahead what is read, and a data loader's
workers may read that far ahead; how far they do changes nothing. Segments 0 and 1 have the blend's
shares. `Segments` says in which order corpora are read, `domain_shares` how much of each and why a
weight is not counted twice.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron_dr.config.domain import DomainConfig
from megatron_dr.config.dr import DRConfig
from megatron_dr.config.kinds import set_named
from megatron_dr.data import domain_shares
from megatron_dr.data.domain_segments import Segments
from megatron_dr.data.domains import DomainPlan, Order
from megatron_dr.mcore import collectives, compat, constants
from megatron_dr.mcore.data import datasets, domains
from megatron_dr.mcore.data.domain_blend import DomainBlend
from megatron_dr.mcore.refuse import Rule
from megatron_dr.mcore.say import say
from megatron_dr.mcore.seams.part import Part
from megatron_dr.mcore.step.roles import Report, with_values

STATE = "megatron_dr_domain_sampling"  # in Megatron's arguments, and so in its checkpoints
_PREFETCH = 2  # batches that torch's loader asks each worker for in advance


class SamplingPart(Part):
    """What is read with domain rows."""

    name = "domain"
    config = DomainConfig
    switch = "sampling"
    flag = "--dr-domain-sampling"
    refused = (
        Rule(
            "dr_rows",
            when=lambda rows, _: rows != "domain",
            says="--dr-domain-sampling reads corpora by the weights of their rows: give --dr-rows "
            "domain, or drop it.",
        ),
        Rule(
            "dr_set",
            when=lambda name, _: not set_named(name or DRConfig.set).weighs_rows,
            says="--dr-domain-sampling reads corpora by the weights of their rows, and {flag} "
            "{value} weighs none: give another set, or drop it.",
        ),
    )

    def settle(self, own: DomainConfig, args: Namespace) -> None:
        of_step = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
        ahead, known = _PREFETCH * args.num_workers, own.interval * of_step
        if of_step + ahead > known:
            raise ValueError(
                f"--num-workers {args.num_workers} read {ahead} microbatches beyond a step's "
                f"{of_step}, but with --dr-domain-interval {own.interval} the next {known} are "
                f"decided: give --dr-domain-interval {1 - (-ahead // of_step)}, or fewer workers."
            )

    def resume(self, own: DomainConfig, args: Namespace, before: Namespace) -> None:
        then = self.of(before)
        high = 1.0 if then is None else then.high
        if high != own.high and not args.skip_train and not datasets.names_samples(args):
            raise ValueError(
                f"{args.load}: the checkpoint's run had an upper bound of {high:g} in "
                f"--dr-domain-sampling, and this one has {own.high:g}, by which the order of "
                "running text is another: give what that run had, or begin a new run from it with "
                "--finetune."
            )


class Corpora:
    """What is read of each corpus in a run: what the blend says."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self._order: Order = DomainPlan(domains.domain_weights(args))

    def of_data(self, train: Any) -> None:
        """The general training set, where this rank reads it."""

    def begin_step(self, num_microbatches: int) -> list[int]:
        """The domain of each of this rank's general microbatches in the step that begins."""
        return domains.of_step(self._order, self.args, num_microbatches)

    def end_step(self, metrics: Report, reports: list[Report]) -> list[Report]:
        """The step's reports, of what the handle says of it."""
        return reports

    def reach(self) -> None:
        """Decide what may be read from here on (collective)."""

    def save(self) -> None:
        """A checkpoint is about to be written."""


class Sampling(Corpora):
    """What is read of each corpus in a run: what its weights say.

    Args:
        device: where the weights are.

    Attributes:
        average_n: of each corpus's weights, float64.

    Raises:
        ValueError: a checkpoint's corpora or sizes are others.
    """

    def __init__(self, args: Namespace, own: DomainConfig, device: torch.device) -> None:
        self.args, self.own, self.device = args, own, device
        self.names, weights = domains.domain_names(args), domains.domain_weights(args)
        self.unit = args.micro_batch_size * compat.data_ranks_per_row()
        plan = Segments(weights, args.consumed_train_samples // self.unit, self._length)
        self.plan = self._order = plan
        total = sum(plan.given)
        state, average = getattr(args, STATE, None), [b / total for b in plan.given]
        if state is not None:
            self._check(state)
            plan.load(state, self.unit)
            average = state["average"]
        self.average_n = torch.tensor(average, dtype=torch.float64, device=device)
        self._before = (-1, self.average_n)  # of the step under way
        self._present: list[float] = []
        self._say()

    @property
    def _length(self) -> int:
        """Units of a segment."""
        samples = get_num_microbatches() * self.args.micro_batch_size * self.args.data_parallel_size
        return int(self.own.interval * samples // self.unit)

    def _check(self, state: dict[str, Any]) -> None:
        """Refuse what is of other corpora, or shorter than what workers read ahead."""
        if (state["corpora"], state["given"]) != (list(self.names), list(self.plan.given)):
            raise ValueError(
                f"{self.args.load}: its shares are of the corpora {' '.join(state['corpora'])}, in "
                "a blend with other weights or corpora than this one's: give that blend, or begin "
                "a new run from it with --finetune."
            )
        together = self.args.micro_batch_size * self.args.data_parallel_size
        ahead = (get_num_microbatches() + _PREFETCH * self.args.num_workers) * together
        if ahead > state["lengths"][1]:
            raise ValueError(
                f"--num-workers {self.args.num_workers} and a step read {ahead:,} samples ahead, "
                f"but the checkpoint's run decided of the next {state['lengths'][1]:,}: resume "
                "with fewer workers, or its batch size."
            )

    def _say(self) -> None:
        own, total = self.own, sum(self.plan.given)
        of_step = self._length / own.interval
        say(
            f"each corpus is read {own.low:g} to {own.high:g} times as much as the blend says, by "
            f"its weight averaged over {own.interval} step(s); shares change every {own.interval}, "
            f"{own.interval} after the weights that they are made of"
        )
        rare = [
            name for name, b in zip(self.names, self.plan.given, strict=True)
            if own.low * b / total * of_step < 1
        ]  # fmt: skip
        if rare:
            say(
                f"note: at its least share less than one of a step's {of_step:g} units (a "
                f"microbatch of the ranks of a row) is of {', '.join(rare)}: in a step without one "
                "its row is zero"
            )

    def of_data(self, train: Any) -> None:
        if isinstance(train, DomainBlend):
            train.plan = self.plan

    # -- a step ----------------------------------------------------------------------------------
    def begin_step(self, num_microbatches: int) -> list[int]:
        position = self.args.consumed_train_samples
        if position == self._before[0]:  # Megatron runs it again
            self.average_n = self._before[1]
        self._before = (position, self.average_n)
        self.reach()
        first = position // self.unit
        groups = self.args.data_parallel_size // compat.data_ranks_per_row()
        read = self.plan.read(first, num_microbatches * groups)
        self._present = [float(d in read) for d in range(len(self.names))]
        return super().begin_step(num_microbatches)

    def end_step(self, metrics: Report, reports: list[Report]) -> list[Report]:
        weight_n = torch.stack([metrics[f"dr weight {name}"] for name in self.names])
        present_n = torch.stack([constants.scalar(p, self.device) for p in self._present])
        for role in ("target", "general"):  # a step that is left out, or part of it
            present_n = present_n * (metrics.get(f"dr bad {role}", present_n.new_zeros(())) == 0)
        self.average_n = domain_shares.averaged(
            self.average_n, weight_n, present_n, 1.0 / self.own.interval
        )
        shares = self.plan.at(self._before[0] // self.unit).shares
        return with_values(reports, {
            f"dr share {name}": constants.scalar(share / sum(shares), self.device)
            for name, share in zip(self.names, shares, strict=True)
        })  # fmt: skip

    def reach(self) -> None:
        while self.args.consumed_train_samples >= self.plan.last.start * self.unit:
            average_n = self.average_n.clone()
            collectives.from_first(average_n, dist.group.WORLD)  # the same bits everywhere
            self.plan.add(self._length, domain_shares.between(
                average_n.tolist(), self.plan.given, self.own.low, self.own.high
            ))  # fmt: skip

    def save(self) -> None:
        state = {"corpora": list(self.names), "average": self.average_n.tolist()}
        setattr(self.args, STATE, state | self.plan.state(self.unit))


def of_run(args: Namespace, dr: DRConfig, device: torch.device) -> Corpora | None:
    """Of a run with domain rows; None with others."""
    if not dr.row_kind.named:
        return None
    own = SamplingPart().of(args)
    return Corpora(args) if own is None else Sampling(args, own, device)


def with_room(args: Namespace, provider: Callable[..., Any]) -> Callable[..., Any]:
    """What builds a run's datasets, with as many sequences of running text as may be read of each
    corpus; Megatron builds what the blend's shares ask for. Samples have no end."""
    own = SamplingPart().of(args)
    if own is None or datasets.names_samples(args):
        return provider
    weights = domains.domain_weights(args)
    factor = min(own.high, sum(weights) / min(weights))

    def larger(num_samples: Any, *rest: Any, **more: Any) -> Any:
        train, *others = num_samples
        return provider([math.ceil(train * factor), *others], *rest, **more)

    larger.is_distributed = getattr(provider, "is_distributed", False)  # type: ignore[attr-defined]
    return larger
