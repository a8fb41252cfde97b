"""The `--dr-*` flags, derived from the configuration's fields, beside Megatron's own."""

import argparse
import contextlib
import dataclasses
import os
from typing import Any, Literal, get_args, get_origin

from megatron_dr.config import DRConfig, TargetConfig
from megatron_dr.lora_config import LoRAConfig
from megatron_dr.mcore import cpu
from megatron_dr.meso_config import MesoConfig
from megatron_dr.preference_config import PreferenceConfig
from megatron_dr.rl_config import RLConfig

# Flags that mean something only with some values of another: {flag: (other, values)}. Those that
# depend on the set or on the rows are declared there.
_NEEDS = {
    "end_alpha": ("alpha_style", ("linear", "cosine")),
    "sketch_size": ("gram", ("sketch", "auto")),
    "sketch_error": ("gram", ("sketch", "auto")),
}


_OF_THE_RUN = ("dr_device", "dr_pack")  # flags that switch no plugin on

# Parts of their own: flags --dr-NAME-FIELD; the named field's flag switches one on.
_Part = type[LoRAConfig] | type[MesoConfig] | type[RLConfig] | type[PreferenceConfig]
_PARTS: dict[str, tuple[_Part, str]] = {
    "lora": (LoRAConfig, "rank"),
    "meso": (MesoConfig, "size"),
    "rl": (RLConfig, "algorithm"),
    "dpo": (PreferenceConfig, "beta"),
}


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group; usable as Megatron's `extra_args_provider`."""
    group = parser.add_argument_group("megatron-dr (data-regularised post-training)")
    for field in (*dataclasses.fields(DRConfig), *dataclasses.fields(TargetConfig)):
        default = "none" if field.default is None else field.default
        if field.name == "set":  # no flag of ours: the plugin is off
            default = f"off; with --dr-target-data {field.default}"
        _add(group, field.name, field, default)
    for part, (config, switch) in _PARTS.items():
        for field in dataclasses.fields(config):
            default = "none" if field.default is None else field.default
            default = "off" if field.name == switch else default
            _add(group, f"{part}_{field.name}", field, default)
    group.add_argument(
        "--dr-pack",
        action="store_true",
        default=None,
        help="put several samples into each sequence, with attention inside each alone; both "
        "roles; a batch then counts packs [flag] (default: off)",
    )
    group.add_argument(
        "--dr-device",
        choices=("cuda", "cpu"),
        default=os.environ.get(cpu.ENVIRONMENT_VARIABLE, "cuda"),
        help="cpu: run Megatron without a GPU, over gloo [device] (default: cuda, or "
        f"${cpu.ENVIRONMENT_VARIABLE})",
    )
    _mend_help(parser)
    return parser


def _add(group: Any, name: str, field: Any, default: Any) -> None:
    """A field's flag; none for what Megatron's own flags tell."""
    if not field.metadata:
        return
    options: dict[str, Any] = {
        "dest": f"dr_{name}",
        "default": None,
        "help": f"{field.metadata['help']} [{field.metadata['unit']}] (default: {default})",
    }
    if field.type is bool:
        options["action"] = "store_true"
    elif get_origin(field.type) is Literal:
        options["choices"] = get_args(field.type)
    else:
        options["type"] = _number(field.type) or str
    group.add_argument(f"--dr-{name.replace('_', '-')}", **options)


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
    given = {
        name[3:]: value
        for name, value in vars(args).items()
        if name.startswith("dr_") and name not in _OF_THE_RUN and value is not None
        and name.split("_")[1] not in _PARTS
    }
    rl = part_from_args(args, "rl")
    if rl is not None:
        _add_rl_defaults(given, rl)
    elif not given and part_from_args(args, "dpo") is not None:
        given["set"] = "mean"
    if not given:
        return None
    if "set" not in given and not given.keys() - {"metrics", "target_valid_data"}:
        given["set"] = "mean"  # only watched: the step is Megatron's own
    if "set" not in given and "target_data" not in given:
        flags = ", ".join(f"--dr-{n.replace('_', '-')}" for n in given)
        raise ValueError(f"{flags} given without --dr-set or --dr-target-data: add one of them.")
    own = {f.name for f in dataclasses.fields(TargetConfig)}
    dr = DRConfig(**{k: v for k, v in given.items() if k not in own})
    target = TargetConfig(**{k: v for k, v in given.items() if k in own})
    _check_together(given, dr, target, itself=rl is not None and rl.target == "self")
    return dr, target


def _add_rl_defaults(given: dict[str, Any], rl: RLConfig) -> None:
    """Training by rewards: the set of the paper (arXiv 2605.07063) where there is a target."""
    if rl.target == "self":
        for name in ("target_data", "target_batch_size"):
            if name in given:
                raise ValueError(
                    f"--dr-{name.replace('_', '-')} has no meaning with --dr-rl-target self: drop "
                    "one of them."
                )
    if rl.filter == "once":
        _add_filter_defaults(given, rl)
    if "set" in given:
        return
    if rl.target == "self" or "target_data" in given:
        given.update({"set": "filter", "fraction": 1.0, "alpha": 0.0} | given)
    elif not given.keys() - {"metrics", "target_valid_data"}:
        given["set"] = "mean"


def _add_filter_defaults(given: dict[str, Any], rl: RLConfig) -> None:
    """A rollout that is filtered once: its steps are plain."""
    flag = "--dr-rl-filter once"
    if rl.target != "self" and "target_data" not in given:
        raise ValueError(f"{flag} needs a target: give --dr-target-data, or --dr-rl-target self.")
    if given.setdefault("set", "mean") != "mean":
        raise ValueError(
            f"{flag} is followed by plain training, and does not go with --dr-set {given['set']}: "
            "drop one of them."
        )
    for name in ("alpha", "alpha_style", "target_batch_size"):
        if name in given:
            raise ValueError(
                f"--dr-{name.replace('_', '-')} has no meaning with {flag}, whose steps have no "
                "target in them: drop it."
            )


def part_from_args(args: argparse.Namespace, name: str) -> Any:
    """The configuration of a part of its own (`lora`, `meso`, `rl`, `dpo`); None where it is off.

    Raises:
        ValueError: flags out of range, or without the one that switches it on.
    """
    config, switch = _PARTS[name]
    fields = [f.name for f in dataclasses.fields(config) if f.metadata]
    given = {f: getattr(args, f"dr_{name}_{f}", None) for f in fields}
    given = {f: value for f, value in given.items() if value is not None}
    if switch in given:
        return config(**given)
    if given:
        first = next(iter(given)).replace("_", "-")
        raise ValueError(
            f"--dr-{name}-{first} needs --dr-{name}-{switch}: give it, or drop the flag."
        )
    return None


def _check_together(
    given: dict[str, Any], dr: DRConfig, target: TargetConfig, itself: bool
) -> None:
    """Refuse contradictions; `itself`: the general data are the target too."""
    needs = {name: other for name, (other, has) in _NEEDS.items() if getattr(dr, other) not in has}
    unread = dr.unread() | needs
    fixed = dr.feasible_set().alpha
    if fixed is not None:
        unread |= {"alpha": "set"} if dr.alpha != fixed else {}
        unread |= {"alpha_style": "set"} if dr.alpha_style != "constant" else {}
    elif dr.alpha_style == "auto":
        unread["alpha"] = "alpha_style"
    for name in given:
        if name in unread:
            other = unread[name]
            raise ValueError(
                f"--dr-{name.replace('_', '-')} has no meaning with "
                f"--dr-{other.replace('_', '-')} {getattr(dr, other)}: drop one of them."
            )
    if "sketch_size" in given and "sketch_error" in given:
        raise ValueError(
            "--dr-sketch-error sets the sketch's size, and so does --dr-sketch-size: drop one."
        )
    if target.target_data is None and not itself:
        if "target_batch_size" in given:
            raise ValueError(
                "--dr-target-batch-size needs --dr-target-data: give it, or drop the flag."
            )
        if dr.needs_target:
            raise ValueError(
                f"--dr-set {dr.set}{_style(dr)} needs --dr-target-data: give the target set's "
                "path, or --dr-set mean alone."
            )
        if "alpha" in given and dr.alpha > 0:
            raise ValueError("--dr-alpha needs --dr-target-data: give it, or drop the flag.")


def _style(dr: DRConfig) -> str:
    return "" if dr.alpha_style == "constant" else f" with --dr-alpha-style {dr.alpha_style}"
