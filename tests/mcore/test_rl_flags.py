"""Flags of training by rewards: the set that they default to, and contradictions."""

import argparse

import pytest

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore.loop import parts
from megatron_dr.mcore.loop.arguments import add_arguments
from megatron_dr.mcore.rl import part

from ._rl_flags import RL, configs, parsed


def test_the_set_is_that_of_the_paper_where_there_is_a_target() -> None:
    for more in ("--dr-target-data t.jsonl", "--dr-rl-target self"):
        dr, _ = configs(more)
        assert (dr.set, dr.fraction, dr.alpha) == ("filter", 1.0, 0.0)
    assert configs("")[0].set == "mean"
    assert configs("--dr-target-data t.jsonl --dr-set cone")[0] == DRConfig(set="cone")
    assert configs("--dr-rl-target self --dr-set mean")[0].alpha_style == "constant"
    assert configs("--dr-rl-target self --dr-fraction 0.5")[0].fraction == 0.5


def test_its_flags_need_the_one_that_switches_it_on() -> None:
    args = add_arguments(argparse.ArgumentParser()).parse_args(["--dr-rl-group", "4"])
    with pytest.raises(ValueError, match="--dr-rl-group needs --dr-rl-algorithm"):
        parts.prepare(args)


WRONG = {
    "": "needs general prompts: give --data-path prompts.jsonl",
    "--data-path 0.5 a.jsonl": "--data-path 0.5: with --dr-rl-algorithm prompts are files that",
    "--data-path a.jsonl --mock-data": "does not go with --mock-data",
    "--data-path a.jsonl --iterations-to-skip 2 3": "does not go with --iterations-to-skip (its",
    "--data-path a.jsonl --dr-rows domain": "does not go with --dr-rows domain",
    "--data-path a.jsonl --dr-target-ranks 1": "does not go with --dr-target-ranks",
    "--data-path a.jsonl --dataloader-type cyclic": "drop --dataloader-type cyclic",
    "--data-path a.jsonl --dr-target-data a=b": "takes one target set, of prompts, without a name",
    "--data-path a.jsonl --dr-rl-valid-data b.jsonl": "held-out prompts need --eval-interval",
}


@pytest.mark.parametrize("more, sentence", WRONG.items())
def test_contradictions_are_refused(more: str, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        parts.prepare(parsed(more))
    assert sentence in str(caught.value)


OTHER = {
    "--dr-rl-algorithm ppo": "--dr-rl-algorithm grpo, and",
    "--dr-rl-prompts 9": "--dr-rl-prompts 8, and a cycle that is under way can't go on with 9",
    "--dr-rl-group 4": "--dr-rl-group 8, and",
    "--dr-rl-epochs 2": "give --dr-rl-epochs 1, or --finetune",
    "--global-batch-size 32": "--global-batch-size 16, and",
    "--seq-length 64": "--seq-length 32, and",
}


def parsed_with_batch(more: str) -> argparse.Namespace:
    parser = add_arguments(argparse.ArgumentParser())
    parser.add_argument("--global-batch-size", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=32)
    parser.add_argument("--load", default="folder")
    return parser.parse_args(more.split())


def resume(args: argparse.Namespace, before: argparse.Namespace) -> None:
    for each, own in parts.on(args):
        each.resume(own, args, before)


@pytest.mark.parametrize("more, sentence", OTHER.items())
def test_a_cycle_goes_on_only_with_its_own_flags(more: str, sentence: str) -> None:
    before = parsed_with_batch(RL)
    resume(parsed_with_batch(RL + "--dr-rl-kl 0.1 --dr-rl-max-tokens 9"), before)
    with pytest.raises(ValueError) as caught:
        resume(parsed_with_batch(RL + more), before)
    assert sentence in str(caught.value)


def test_a_run_without_rewards_is_not_gone_on_with() -> None:
    with pytest.raises(ValueError, match="is not of a run with --dr-rl-algorithm: give --finetune"):
        resume(parsed_with_batch(RL), parsed_with_batch(""))
    resume(parsed_with_batch(""), parsed_with_batch(RL))


def test_no_default_is_called_None() -> None:
    assert "None)" not in add_arguments(argparse.ArgumentParser()).format_help()


def test_megatrons_flags_are_set() -> None:
    args = parsed("--data-path a.jsonl b.jsonl")
    parts.prepare(args)
    assert (args.dataloader_type, args.calculate_per_token_loss, args.eval_iters) == (
        "external", True, 0,
    )  # fmt: skip


def test_with_the_rollout_as_target_its_batch_is_all_of_it() -> None:
    from megatron_dr.config.rl import RLConfig

    rl = RLConfig(reward="a:b", target="self", prompts=3, group=5)
    target = part.RLPart().step_target(rl, DRConfig(), None)
    assert target is not None and target.target_batch_size == 15
