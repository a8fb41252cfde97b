"""Flags of training by rewards, parsed."""

import argparse

from megatron_dr.config.dr import DRConfig
from megatron_dr.config.target import TargetConfig
from megatron_dr.mcore.loop.arguments import add_arguments, configs_from_args

RL = "--dr-rl-algorithm grpo --dr-rl-reward megatron_dr.rl.rewards:numeric "


def parsed(more: str) -> argparse.Namespace:
    parser = add_arguments(argparse.ArgumentParser())
    parser.add_argument("--data-path", nargs="*")
    parser.add_argument("--dataloader-type")
    parser.add_argument("--eval-interval", type=int)
    parser.add_argument("--iterations-to-skip", nargs="+", type=int, default=[])
    parser.add_argument("--mock-data", action="store_true")
    return parser.parse_args((RL + more).split())


def configs(more: str) -> tuple[DRConfig, TargetConfig]:
    found = configs_from_args(parsed(more))
    assert found is not None
    return found
