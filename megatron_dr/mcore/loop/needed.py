"""Flags of Megatron's that need another flag or another package to have an effect.

Without it Megatron goes on with a line of its log, or fails on one rank while the others wait. Here
they are refused, on every rank, before Megatron's own checks.
"""

import os
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

from megatron_dr.mcore.refuse import Rule

_NVRX = "nvidia-resiliency-ext"


def _no(module: str) -> bool:
    """A package, or a module of one, isn't installed."""
    try:
        return find_spec(module) is None
    except (ImportError, ValueError):  # no parent; a stand-in that says nothing of itself
        return True


def _cannot_save() -> bool:
    from megatron.core.dist_checkpointing.strategies import nvrx

    try:
        return not nvrx.has_nvrx_async_support()
    except AssertionError:  # too old
        return True


def _no_autoresume() -> bool:
    folder = Path(os.environ.get("SUBMIT_SCRIPTS", "."))  # as Megatron has it
    return _no("userlib") and not (folder / "userlib").exists()


def _package(name: str, package: str, modules: str = "") -> Rule:
    return Rule(
        name,
        when=lambda given, _: given and any(map(_no, (modules or package).split())),
        says=f"{{flag}} needs the package {package}: install it, or drop {{flag}}.",
    )


def _with(name: str, other: str) -> Rule:
    """A flag that nothing reads without another."""
    flag = "--" + other.replace("_", "-")
    return Rule(
        name,
        when=lambda given, args: given and not getattr(args, other),
        says=f"{{flag}} has no effect without {flag}: give both, or drop {{flag}}.",
    )


def _strategy_is_not_there(given: bool, args: Namespace) -> bool:
    return given and args.async_strategy == "nvrx" and _cannot_save()


RULES = (
    Rule("async_save", when=lambda given, args: given and args.ckpt_format == "torch",
         says="{flag} does not go with --ckpt-format torch: give --ckpt-format torch_dist."),
    _with("async_save", "use_persistent_ckpt_worker"),
    Rule("async_save", when=_strategy_is_not_there,
         says=f"{{flag}} needs the package {_NVRX} 0.6 or newer: install it, or give "
         "--async-strategy mcore."),
    _with("use_persistent_ckpt_worker", "async_save"),
    Rule("non_persistent_ckpt_type",
         when=lambda kind, _: kind == "local" and _no("nvidia_resiliency_ext"),
         says=f"{{flag}} local needs the package {_NVRX}: install it, or give global."),
    Rule("enable_ft_package",
         says="{flag}: no run of the plugin was tried under ft_launcher, whose monitor it reports "
         "to; drop it, and have torchrun restart the run."),
    _with("calc_ft_timeouts", "enable_ft_package"),
    _package("fault_injector_ranks", _NVRX, "nvidia_resiliency_ext"),
    _package("fault_injector_num_ranks", _NVRX, "nvidia_resiliency_ext"),
    _package("tensorboard_dir", "tensorboard"),
    _package("wandb_project", "wandb"),
    _with("wandb_project", "tensorboard_dir"),  # Megatron writes to both or to neither
    _with("wandb_project", "wandb_exp_name"),
    Rule("wandb_project", when=lambda on, args: on and not (args.wandb_save_dir or args.save),
         says="{flag} needs a folder: give --wandb-save-dir, or --save."),
    *(_with(f"wandb_{name}", "wandb_project") for name in ("entity", "exp_name", "save_dir")),
    _package("run_workload_inspector_server", "workload_inspector"),
    Rule("adlr_autoresume", when=lambda given, _: given and _no_autoresume(),
         says="{flag} needs NVIDIA's userlib, which is not here: drop it."),
)  # fmt: skip
