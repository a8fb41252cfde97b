"""The features of training: a new one is a module of its own and a line of this list."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron_dr.config.dr import DRConfig
from megatron_dr.config.target import TargetConfig
from megatron_dr.mcore.data.domain_blend import DomainPart
from megatron_dr.mcore.data.domain_sampling import SamplingPart
from megatron_dr.mcore.data.packed import PackPart
from megatron_dr.mcore.data.template import TemplatePart
from megatron_dr.mcore.dpo.part import DPOPart
from megatron_dr.mcore.model.lora import LoRAPart
from megatron_dr.mcore.model.meso import MesoPart
from megatron_dr.mcore.rl.part import RLPart, ValuePart
from megatron_dr.mcore.seams.part import Part
from megatron_dr.mcore.seams.source import Source

PARTS: list[Part] = [
    LoRAPart(),
    MesoPart(),
    RLPart(),
    ValuePart(),  # after the adapters, which freeze what is there
    DPOPart(),
    PackPart(),
    DomainPart(),
    SamplingPart(),
    TemplatePart(),
]


def on(args: Namespace) -> list[tuple[Part, Any]]:
    """The parts that are switched on, each with its configuration.

    Raises:
        ValueError: flags out of range, or without the one that switches their part on.
    """
    found = [(part, part.of(args)) for part in PARTS]
    return [(part, own) for part, own in found if own is not None]


def prepare(args: Namespace) -> None:
    """Before Megatron's own checks: refuse, then set what the parts need.

    Raises:
        ValueError: flags that contradict one another.
    """
    for part, _ in on(args):
        part.refuse(args)
    for part, own in on(args):
        part.prepare(own, args)


def hooks(args: Namespace) -> list[tuple[str, Callable[..., Any]]]:
    """What changes the model that Megatron builds, each with the part's flag."""
    found = [(part.flag, part.on_model(own, args)) for part, own in on(args)]
    return [(flag, hook) for flag, hook in found if hook is not None]


def settle(args: Namespace) -> None:
    """As `prepare`, after Megatron's own checks."""
    for part, own in on(args):
        part.refuse(args)
        part.settle(own, args)


def step_target(args: Namespace, dr: DRConfig, target: TargetConfig) -> TargetConfig | None:
    """The target as the steps have it; None where they have none."""
    found = None if target.target_data is None else target
    for part, own in on(args):
        found = part.step_target(own, dr, found)
    return found


def known(args: Namespace) -> dict[str, Any]:
    """Fields of `DRConfig` that have no flag."""
    return {name: value for part, _ in on(args) for name, value in part.known(args).items()}


def source(args: Namespace, target: TargetConfig) -> Source:
    """Where the run gets its data and its forward step: datasets, unless a part says otherwise."""
    for part, own in on(args):
        found = part.source(own, args, target)
        if found is not None:
            return found
    from megatron_dr.mcore.data.source import DatasetSource

    return DatasetSource(args, target)
