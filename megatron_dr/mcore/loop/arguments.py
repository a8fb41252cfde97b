"""The `--dr-*` flags, derived from the configuration's fields, beside Megatron's own."""

import argparse
import contextlib
import dataclasses
import os
from typing import Any, Literal, get_args, get_origin

from megatron_dr.config.dr import DRConfig
from megatron_dr.config.kinds import set_named
from megatron_dr.config.target import NAMED, WATCHING, TargetConfig
from megatron_dr.config.target_sets import parsed
from megatron_dr.mcore import cpu
from megatron_dr.mcore.loop import parts

# Flags that mean something only with some values of another: {flag: (other, values)}. Those that
# depend on the set or on the rows are declared there.
_NEEDS = {
    "end_alpha": ("alpha_style", ("linear", "cosine")),
    "keep_general": ("alpha_style", ("auto",)),
    "sketch_size": ("gram", ("sketch", "auto")),
    "sketch_error": ("gram", ("sketch", "auto")),
}
_DIALS = {  # flags of what another switches on
    "generate": ("generate_metrics", "generate_tokens"),
    "record": ("record_every", "record_rows"),
}
_BATCH = "target_batch_size"
_ALPHA = {"alpha", "beta", "end_alpha", "alpha_style"}  # with none of them, alpha is auto


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group; usable as Megatron's `extra_args_provider`."""
    group = parser.add_argument_group("megatron-dr (data-regularised post-training)")
    defaults = {  # with no flag of ours the plugin is off
        "set": f"off; with --dr-target-data {DRConfig.set}",
        "alpha_style": "auto where there is a target and no dial of alpha or beta is given, else "
        f"{DRConfig.alpha_style}",
    }
    for field in (*dataclasses.fields(DRConfig), *dataclasses.fields(TargetConfig)):
        _add(group, field.name, field, defaults.get(field.name))
    for part in parts.PARTS:
        for field in dataclasses.fields(part.config) if part.config else ():
            off = "off" if field.name == part.switch else None
            _add(group, f"{part.name}_{field.name}", field, off)
        for flag, options in part.flags.items():
            group.add_argument(flag, **options)
    group.add_argument(
        "--dr-device",
        choices=("cuda", "cpu"),
        default=os.environ.get(cpu.ENVIRONMENT_VARIABLE, "cuda"),
        help="cpu: run Megatron without a GPU, over gloo [device] (default: cuda, or "
        f"${cpu.ENVIRONMENT_VARIABLE})",
    )
    group.add_argument(
        "--dr-config",
        metavar="FILE",
        help="YAML file of these flags by their names without --dr-; the command line wins [path] "
        "(default: none)",
    )
    group.add_argument(
        "--dr-changed-ok",
        nargs="+",
        default=None,
        metavar="NAME",
        help="flags, without their dashes, that a resumed run may have otherwise than the run of "
        "its checkpoint where that is refused [names] (default: none)",
    )
    _mend_help(parser)
    return parser


def _add(group: Any, name: str, field: Any, off: str | None) -> None:
    """A field's flag; none for what Megatron's own flags tell. `off`: what it says of a default."""
    if not field.metadata:
        return
    default = off or ("none" if field.default is None else field.default)
    options: dict[str, Any] = {
        "dest": f"dr_{name}",
        "default": None,
        "help": f"{field.metadata['help']} [{field.metadata['unit']}] (default: {default})",
    }
    if name in NAMED:
        options |= {"action": _Named, "nargs": "+", "type": _whole if name == _BATCH else str}
    elif field.type is bool:
        options["action"] = "store_true"
    elif get_origin(field.type) is Literal:
        options["choices"] = get_args(field.type)
    else:
        options["type"] = _number(field.type) or str
    group.add_argument(f"--dr-{name.replace('_', '-')}", **options)


def _whole(text: str) -> int | str:
    """A whole number, where it is one; what else it is, is told later, on every rank."""
    return int(text) if text.isdecimal() else text


class _Named(argparse.Action):
    """One value as it is, without a list around it."""

    def __call__(self, parser: Any, args: Any, values: Any, option: str | None = None) -> None:
        setattr(args, self.dest, values[0] if len(values) == 1 else values)


def _number(kind: Any) -> type | None:
    """int or float, also where None is allowed."""
    kinds = get_args(kind) or (kind,)
    return next((k for k in (int, float) if k in kinds), None)


def _mend_help(parser: argparse.ArgumentParser) -> None:
    """Megatron 0.19 has a bare % in the help of a flag, which ends --help in a traceback."""
    for action in parser._actions:
        with contextlib.suppress(KeyError, TypeError, ValueError):
            action.help = action.help and action.help % {**vars(action), "prog": parser.prog}
        action.help = action.help and action.help.replace("%", "%%")


def configs_from_args(args: argparse.Namespace) -> tuple[DRConfig, TargetConfig] | None:
    """The configurations of the flags given; None when the plugin was not asked for.

    Raises:
        ValueError: flags out of range or against one another.
    """
    fields = (*dataclasses.fields(DRConfig), *dataclasses.fields(TargetConfig))
    values = {f.name: getattr(args, f"dr_{f.name}", None) for f in fields if f.metadata}
    given = {name: value for name, value in values.items() if value is not None}
    found = parts.on(args)
    for part, its in found:
        part.defaults(its, given)
    if not given:
        return None
    if "set" not in given and not given.keys() - WATCHING:
        given["set"] = "mean"  # only watched: the step is Megatron's own
    if "set" not in given and "target_data" not in given:
        flags = ", ".join(f"--dr-{n.replace('_', '-')}" for n in given)
        raise ValueError(f"{flags} given without --dr-set or --dr-target-data: add one of them.")
    itself = any(part.is_target(its) for part, its in found)
    has_target = itself or "target_data" in given
    is_open = set_named(given.get("set", DRConfig.set)).alpha is None
    one_target = given.get("targets", DRConfig.targets) == DRConfig.targets
    if has_target and is_open and one_target and not given.keys() & _ALPHA:
        given["alpha_style"] = "auto"
    for name in given.keys() & NAMED.keys():
        given[name] = parsed(f"--dr-{name.replace('_', '-')}", given[name], NAMED[name])
    own = {f.name for f in dataclasses.fields(TargetConfig)}
    dr = DRConfig(**{k: v for k, v in given.items() if k not in own})
    target = TargetConfig(**{k: v for k, v in given.items() if k in own})
    _check_together(given, dr, target, itself)
    _check_switches(given)
    return dr, target


def _check_together(
    given: dict[str, Any], dr: DRConfig, target: TargetConfig, itself: bool
) -> None:
    """Refuse contradictions; `itself`: the general data are the target too."""
    needs = {name: other for name, (other, has) in _NEEDS.items() if getattr(dr, other) not in has}
    if dr.row_kind.in_layers and dr.score in ("ghost", "exact"):
        needs |= dict.fromkeys(("sketch_error", "kronecker_out", "kronecker_in"), "score")
    unread = dr.unread() | needs
    fixed = dr.feasible_set().alpha
    if fixed is not None:
        unread |= {"alpha": "set"} if dr.alpha != fixed else {}
        unread |= {"alpha_style": "set"} if dr.alpha_style != "constant" else {}
    elif dr.alpha_style == "auto":
        unread |= {"alpha": "alpha_style", "beta": "alpha_style"}
    if not dr.weighs_rows:  # d is g, or t alone
        unread["beta"] = "set"
    for name in given:
        if name in unread:
            other = unread[name]
            raise ValueError(
                f"--dr-{name.replace('_', '-')} has no meaning with "
                f"--dr-{other.replace('_', '-')} {getattr(dr, other)}: drop one of them."
            )
    if "sketch_error" in given and "sketch_size" in given:
        raise ValueError(
            "--dr-sketch-error sets the sketch's size, and so does --dr-sketch-size: drop one."
        )
    if {"sketch_error", "kronecker_out", "kronecker_in"} <= given.keys():
        raise ValueError(
            "--dr-sketch-error sets the sketch's sides, and so do --dr-kronecker-out and "
            "--dr-kronecker-in: drop it, or one of these."
        )
    if dr.targets == "maximin":
        _check_maximin(given, target)
    if dr.merges_target and len(target.target_sets) > 1:
        raise ValueError(
            "--dr-target-pass merged takes one target set: of several each has microbatches of its "
            "own, so drop it, or give one set."
        )
    if target.target_data is None and not itself:
        if "on_bad_gradient" in given and not dr.row_kind.named:
            raise ValueError(
                "--dr-on-bad-gradient needs --dr-target-data or domain rows: without them a step "
                "is Megatron's own; give one of them, or drop the flag."
            )
        for name in (name for name in (_BATCH, "target_weights") if name in given):
            raise ValueError(
                f"--dr-{name.replace('_', '-')} needs --dr-target-data: give it, or drop the flag."
            )
        if dr.needs_target:
            style = f" with --dr-alpha-style {dr.alpha_style}"
            style = "" if dr.alpha_style == "constant" else style
            raise ValueError(
                f"--dr-set {dr.set}{style} needs --dr-target-data: give the target set's "
                "path, or --dr-set mean alone."
            )
        if "alpha" in given and dr.alpha > 0:
            raise ValueError("--dr-alpha needs --dr-target-data: give it, or drop the flag.")


def _check_maximin(given: dict[str, Any], target: TargetConfig) -> None:
    if len(target.target_sets) < 2:
        raise ValueError(
            "--dr-targets maximin needs several target sets: give --dr-target-data NAME=PATH "
            "NAME=PATH, or drop it."
        )
    if "target_weights" in given:
        raise ValueError(
            "--dr-targets maximin finds the weights of the target sets at every step, and "
            "--dr-target-weights gives them: drop one of them."
        )


def _check_switches(given: dict[str, Any]) -> None:
    for switch, dials in _DIALS.items():
        for name in (name for name in dials if name in given and switch not in given):
            raise ValueError(
                f"--dr-{name.replace('_', '-')} needs --dr-{switch}: give it, or drop the flag."
            )
