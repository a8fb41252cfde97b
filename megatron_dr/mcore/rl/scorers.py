"""Rewards of completions: each rank evaluates a share, all ranks get all."""

from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist

from megatron_dr.config.rl import RLConfig
from megatron_dr.mcore import errors
from megatron_dr.mcore.collectives import of_all_ranks
from megatron_dr.rl.reward_model import RewardModel
from megatron_dr.rl.reward_pool import RewardPool, Sample

# What gives rewards: a function in worker processes, or a model on the rank's device.
Scorer = RewardPool | RewardModel


def open_scorers(rl: RLConfig) -> dict[str, Scorer]:
    """By role: of `--dr-rl-reward` or `--dr-rl-reward-model`, and `--dr-rl-target-reward`.

    Roles may share one (collective).

    Raises:
        ValueError: a rank can't load it.
    """
    pool = partial(
        RewardPool, workers=rl.reward_workers, timeout=rl.reward_timeout,
        unsafe_sandbox=rl.unsafe_sandbox,
    )  # fmt: skip
    with errors.agreed():
        general: Scorer
        if rl.reward_model is not None:
            general = RewardModel(
                rl.reward_model, torch.cuda.current_device(), rl.reward_label, rl.reward_text
            )
        else:
            assert rl.reward is not None
            general = pool(rl.reward)
        own = rl.target_reward
        return {"general": general, "target": general if own is None else pool(own)}


def score(scorer: Scorer, samples: Sequence[Sample]) -> tuple[torch.Tensor, Counter[str]]:
    """Rewards [n], NaN where the sample failed, and the failures by kind (collective).

    Args:
        samples: the same on every rank.

    Raises:
        ValueError: a rank can't load the function any more.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    with errors.agreed():
        own = scorer.score(samples[rank::world])
    rewards = torch.full((len(samples),), float("nan"), dtype=torch.float64)
    failures: Counter[str] = Counter()
    for number, (found, failed) in enumerate(of_all_ranks((own.rewards, own.failures))):
        values = [float("nan") if value is None else value for value in found]
        rewards[number::world] = torch.tensor(values, dtype=torch.float64)
        failures.update(failed)
    return rewards, failures
