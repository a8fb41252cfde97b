"""Flags of a run that trains by rewards: what it sets of Megatron's, and what it refuses."""

import dataclasses
from argparse import Namespace

from megatron_dr.config import DRConfig, TargetConfig
from megatron_dr.data.records import SUFFIXES
from megatron_dr.mcore.arguments import part_from_args
from megatron_dr.mcore.sample_datasets import is_file
from megatron_dr.mcore.training_run import num_target_microbatches
from megatron_dr.rl_config import RLConfig

_REFUSED = {
    "train_data_path": "general prompts go to --data-path",
    "valid_data_path": "held-out general prompts go to --dr-rl-valid-data",
    "test_data_path": "held-out general prompts go to --dr-rl-valid-data",
    "mock_data": "a reward function needs real prompts",
    "dr_pack": "completions are not packed",
    "full_validation": "every validation answers all held-out prompts",
    "non_persistent_save_interval": "rollouts are saved with persistent checkpoints",
    "perform_rl_step": "it is Megatron's own loop for rewards",
}


def prepare(args: Namespace) -> None:
    """Before Megatron's own checks: set what training by rewards needs; without it do nothing.

    Raises:
        ValueError: flags that contradict it.
    """
    rl = part_from_args(args, "rl")
    if rl is None:
        return
    for name, why in _REFUSED.items():
        if getattr(args, name, None):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"--dr-rl-algorithm does not go with {flag} ({why}): drop it.")
    if args.dr_rows == "domain" or args.dr_target_ranks:
        flag = "--dr-target-ranks" if args.dr_target_ranks else "--dr-rows domain"
        raise ValueError(f"--dr-rl-algorithm does not go with {flag}: drop it.")
    if args.dataloader_type not in (None, "external"):
        raise ValueError(
            "--dr-rl-algorithm makes its own batches: drop --dataloader-type "
            f"{args.dataloader_type}."
        )
    if rl.filter == "once" and args.num_experts:
        raise ValueError(
            "--dr-rl-filter once does not go with --num-experts (routers would count the tokens "
            "that it scores): drop one of them."
        )
    prompt_files(args)
    args.dataloader_type = "external"
    args.calculate_per_token_loss = True  # a mean over all ranks' tokens, however they are split
    validates = rl.valid_data is not None or args.dr_target_valid_data is not None
    args.eval_iters = 1 if validates else 0  # one call answers all held-out prompts
    if args.eval_interval is None:
        if validates:
            raise ValueError("held-out prompts need --eval-interval, the steps between two looks.")
        args.eval_interval = 1  # Megatron divides by it also where nothing is held out


def check(args: Namespace, dr: DRConfig, target: TargetConfig) -> None:
    """After Megatron's own checks.

    Raises:
        ValueError: batches that don't come out even, or completions that don't fit.
    """
    rl = part_from_args(args, "rl")
    if rl is None:
        return
    rl.steps_per_cycle(args.global_batch_size)
    if rl.target == "self" and dr.needs_target:
        num_target_microbatches(args, dr, with_target(rl, target))
    if rl.offload and getattr(args, "use_layer_wise_distributed_optimizer", False):
        raise ValueError(
            f"--dr-rl-offload does not go with --optimizer {args.optimizer}, which gathers "
            "parameters in the gradient buffers: drop the flag."
        )
    if rl.max_tokens >= args.seq_length:
        raise ValueError(
            f"--dr-rl-max-tokens {rl.max_tokens} leaves no room for a prompt in --seq-length "
            f"{args.seq_length}: lower it or raise --seq-length."
        )


def with_target(rl: RLConfig, target: TargetConfig) -> TargetConfig:
    """The target's configuration; where it is the rollout itself, its batch is all of it."""
    if rl.target == "self":
        return dataclasses.replace(target, target_batch_size=rl.completions)
    return target


def prompt_files(args: Namespace) -> list[str]:
    """The files of general prompts.

    Raises:
        ValueError: none, or something else.
    """
    paths: list[str] = args.data_path or []
    if not paths:
        raise ValueError(
            "--dr-rl-algorithm needs general prompts: give --data-path prompts.jsonl."
        )
    for path in paths:
        if not is_file(path):
            raise ValueError(
                f"--data-path {path}: with --dr-rl-algorithm prompts are files that end in "
                f"{', '.join(SUFFIXES)}, or folders of them, without weights between them."
            )
    return paths
