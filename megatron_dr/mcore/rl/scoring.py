"""Rewards of completions: each rank evaluates a share, all ranks get all."""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_dr.mcore import errors
from megatron_dr.rl.reward_pool import RewardPool, Sample


def score(pool: RewardPool, samples: Sequence[Sample]) -> tuple[torch.Tensor, Counter[str]]:
    """Rewards [n], NaN where the function failed, and the failures by kind (collective).

    Args:
        samples: the same on every rank.

    Raises:
        ValueError: a rank can't load the function any more.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    with errors.agreed():
        own = pool.score(samples[rank::world])
    shares: list[tuple[list[float | None], Counter[str]]] = [([], Counter())] * world
    dist.all_gather_object(shares, (own.rewards, own.failures))
    rewards = torch.full((len(samples),), float("nan"), dtype=torch.float64)
    failures: Counter[str] = Counter()
    for number, (found, failed) in enumerate(shares):
        values = [float("nan") if value is None else value for value in found]
        rewards[number::world] = torch.tensor(values, dtype=torch.float64)
        failures.update(failed)
    return rewards, failures
