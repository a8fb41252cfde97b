"""A run's arguments: what is refused before Megatron's own checks and after them, on every rank."""

import sys
import traceback
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dr.config.dr import DRConfig
from megatron_dr.config.target import TargetConfig
from megatron_dr.mcore import compat, unpickling
from megatron_dr.mcore.loop import (
    agreement,
    best,
    changes,
    generation,
    needed,
    parts,
    rate,
    record,
    recorder,
)  # fmt: skip
from megatron_dr.mcore.loop.arguments import configs_from_args
from megatron_dr.mcore.refuse import refuse
from megatron_dr.mcore.seams.source import target_microbatches

Configs = tuple[DRConfig, TargetConfig] | None
of_script: list[Callable[[Namespace], None]] = []  # checks of the entry itself, of arguments


def validate(stock: Callable[..., Any], args: Namespace, *rest: Any, **kwargs: Any) -> Any:
    """Whatever this rank refuses, all ranks hear it, and of what they were started with otherwise:
    before Megatron's ranks wait for one another."""
    result, found = None, record.Record()
    refusal, configs = _refusal(_prepare, args)
    if not refusal:
        refusal, result = _refusal(of_megatron, stock, args, *rest, **kwargs)
    if not refusal:
        refusal, found = _refusal(_settle, args, configs)
    agreement.check(args, refusal, (found or {}) | record.layout(args))
    setattr(args, changes.ATTRIBUTE, found)
    return result


def early(function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives that `validate` does not see, or sees too late, or not yet; as there,
    all ranks hear what it refuses."""
    refusal, found = _refusal(function, *args)
    if refusal:
        agreement.check(Namespace(), refusal, record.Record())
    return found


def _refusal(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, Any]:
    """The sentence of its ValueError, and what it gives."""
    try:
        return "", function(*args, **kwargs)
    except ValueError as error:
        return str(error), None


def of_megatron(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Megatron's own checks, many of which are assertions, and some have no text."""
    try:
        return stock(*args, **kwargs)
    except (AssertionError, ValueError) as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        said = str(error) or f"it needs `{(at.line or '').removeprefix('assert ')}`"
        raise ValueError(
            f"Megatron refuses these arguments: {said} ({Path(at.filename).name}, line {at.lineno})"
        ) from error


def _prepare(args: Namespace) -> Configs:
    configs = configs_from_args(args)
    refuse(compat.WHO, compat.OF_LOOP, args)
    if configs is not None:
        refuse(compat.WHO, compat.REFUSED, args)
    if configs is not None or of_script:
        refuse(compat.WHO, needed.RULES, args)
    parts.prepare(args)
    rate.check(args)
    return configs


def _settle(args: Namespace, configs: Configs) -> record.Record:
    parts.settle(args)
    _check_instances(args)
    for check in of_script:
        check(args)
    if configs is not None:
        if configs[0].on_bad_gradient != "stop":  # else it would end the run before
            args.check_for_nan_in_loss_and_grad = False
        best.check(args, configs[1])
        generation.check(args, configs[1])
        recorder.check(args, *configs)
        target = parts.step_target(args, *configs)
        if target is not None:
            target_microbatches(args, configs[0], target)
    return record.of(args, configs)


def _check_instances(args: Namespace) -> None:
    ranks = args.data_parallel_size * args.context_parallel_size
    number = args.num_distributed_optimizer_instances
    if ranks % number:
        raise ValueError(
            f"--num-distributed-optimizer-instances {number} must divide the {ranks} data x "
            "context ranks."
        )


def load_args(stock: Callable[..., Any], args: Namespace, *rest: Any, **kwargs: Any) -> Any:
    early(unpickling.check_loaded, args)
    return stock(args, *rest, **kwargs)


def load_yaml(stock: Callable[..., Any], *rest: Any) -> Any:
    early(_check_yaml)
    return stock(*rest)


def _check_yaml() -> None:
    lost = next((argument for argument in sys.argv if argument.startswith("--dr-")), None)
    if lost is not None:
        raise ValueError(
            f"--yaml-cfg takes the place of the command line, and {lost} would be lost: give "
            "Megatron's flags instead."
        )
