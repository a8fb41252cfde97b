"""The schedule of learning rate and weight decay, where Megatron asserts without naming a flag.

Its steps are samples: iterations times --global-batch-size, or what --train-samples and the like
say. What is refused here ends a run of Megatron too, but in a traceback.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from megatron_dr.mcore import errors

OVERRIDE = "--override-opt_param-scheduler"
_KEEP = "--use-checkpoint-opt_param-scheduler"
_FLAGS = {  # of the scheduler's state, of a run that is counted in {unit}
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "lr_warmup_steps": "--lr-warmup-{unit} or -fraction",
    "lr_decay_steps": "--lr-decay-{unit}, --train-{unit}, --global-batch-size",
    "lr_decay_style": "--lr-decay-style",
    "start_wd": "--weight-decay, --start-weight-decay",
    "end_wd": "--weight-decay, --end-weight-decay",
    "wd_incr_steps": "--train-{unit}, --global-batch-size",
    "wd_incr_style": "--weight-decay-incr-style",
}


def check(args: Namespace) -> None:
    """Raise ValueError for the first flag that makes no schedule; before Megatron's own checks."""
    if args.skip_train or not (args.train_iters or args.train_samples):
        return
    for fault in _faults(args, _unit(args)):
        raise ValueError(fault)


def _unit(args: Namespace) -> str:
    return "samples" if args.train_samples else "iters"


def _faults(args: Namespace, unit: str) -> Iterator[str]:
    other = {"iters": "samples", "samples": "iters"}[unit]
    for name in (f"train_{other}", f"lr_decay_{other}", f"lr_warmup_{other}"):
        if getattr(args, name):
            yield f"{_flag(name)} beside --train-{unit}: give all lengths of a run in one unit."
    if args.lr is None:
        yield "no learning rate: give --lr."
        return
    if not 0 <= args.min_lr <= args.lr:
        yield f"--min-lr {args.min_lr} must be from 0 to --lr {args.lr}."
    if args.lr_warmup_init > args.lr:
        yield f"--lr-warmup-init {args.lr_warmup_init} must be at most --lr {args.lr}."
    yield from _lengths(args, unit)
    ends = (args.start_weight_decay, args.end_weight_decay)
    if args.weight_decay_incr_style == "constant":
        if ends != (None, None):
            yield (
                "--start-weight-decay and --end-weight-decay need --weight-decay-incr-style linear "
                "or cosine: give it, or --weight-decay alone."
            )
    elif None in ends or not 0 <= ends[0] <= ends[1]:
        yield (
            f"--weight-decay-incr-style {args.weight_decay_incr_style} needs --start-weight-decay "
            "from 0 to --end-weight-decay: give both."
        )
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        yield f"{OVERRIDE} takes this run's schedule, {_KEEP} the checkpoint's: drop one."


def _lengths(args: Namespace, unit: str) -> Iterator[str]:
    """Of the warm-up, the decay, and the end of --lr-decay-style WSD."""
    name, whole = f"lr_decay_{unit}", getattr(args, f"lr_decay_{unit}")
    if whole is None:
        name, whole = f"train_{unit}", getattr(args, f"train_{unit}")
    warm_up, fraction = getattr(args, f"lr_warmup_{unit}"), args.lr_warmup_fraction
    said = f"--lr-warmup-{unit} {warm_up}"
    if fraction is not None:
        if warm_up:
            yield f"{said} and --lr-warmup-fraction say the same thing: drop one."
        said, warm_up = f"--lr-warmup-fraction {fraction}", fraction * whole
    if not 0 <= warm_up < whole:
        yield (
            f"{said} must be from 0 and shorter than {_flag(name)} {whole}, in which the rate "
            "reaches its end: change one of them."
        )
    if args.lr_decay_style == "WSD" and getattr(args, f"lr_wsd_decay_{unit}") is None:
        yield f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}: give it."


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def build(stock: Callable[..., Any], optimizer: Any) -> Any:
    """Megatron's scheduler, which says what a checkpoint's has otherwise."""
    scheduler = stock(optimizer)
    scheduler.load_state_dict = partial(_load, scheduler, scheduler.load_state_dict)
    return scheduler


def _load(scheduler: Any, stock: Callable[..., Any], state: dict[str, Any]) -> None:
    from megatron.training import get_args

    with errors.refused():
        check_resumed(get_args(), scheduler.state_dict(), state)
    stock(state)


def check_resumed(args: Namespace, now: dict[str, Any], then: dict[str, Any]) -> None:
    """Refuse a checkpoint's schedule that is not this run's, unless it is said which counts.

    Args:
        now, then: the schedulers' states.
    """
    if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return
    names = [name for name in _FLAGS if name in then and then[name] != now[name]]
    if not names:
        return
    unit = _unit(args)
    changed = "; ".join(
        f"{name} was {then[name]} and is {now[name]} ({_FLAGS[name].format(unit=unit)})"
        for name in names
    )
    raise ValueError(
        f"{args.load}: the checkpoint's schedule of learning rate and weight decay, whose steps "
        f"are samples, is not this run's: {changed}. Give the flags of that run, or {OVERRIDE} "
        f"for this run's schedule, or {_KEEP} for the checkpoint's."
    )
