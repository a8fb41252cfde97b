"""PPO's advantages and returns of a rollout, token by token, and the weight of the KL in them.

Shape suffixes: N completions, T tokens of a sequence; values by token stand at the token before.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from megatron_dr.config.rl import RLConfig
from megatron_dr.rl.advantages import gae, normalised, token_rewards
from megatron_dr.rl.experience import Experience
from megatron_dr.rl.losses import KLEstimator

_MAX_ERROR = 0.2


class Estimator:
    """Completes rollouts with returns and advantages; steers the KL's weight where it has a target.

    Attributes:
        kl_weight: of the next rollout.
    """

    def __init__(self, rl: RLConfig) -> None:
        self.rl, self.kl_weight = rl, rl.kl

    def complete(self, rollout: Experience, value_NT: Tensor, by_reward: bool) -> Experience:
        """The rollout with values, returns and, but for `by_reward`, advantages by token.

        Args:
            rollout: with log-probabilities and rewards.
            by_reward: whether it is trained on by its rewards alone: it keeps its advantages.
        """
        advantage_NT, return_NT = estimates(
            rollout.reward_N, rollout.old_NT, rollout.reference_NT, value_NT, rollout.mask_NT,
            kl_weight=self.kl_weight, discount=self.rl.discount, decay=self.rl.gae_decay,
            kl_estimator=self.rl.estimator,
        )  # fmt: skip
        is_token_NT = rollout.mask_NT.bool()
        scored_NT = is_token_NT & ~rollout.reward_N.isnan()[:, None]
        statistics = {
            "value": _mean(value_NT[is_token_NT]), "return": _mean(return_NT[scored_NT]),
        }  # fmt: skip
        if self.rl.kl > 0:
            kl = float(rollout.kl_N(self.rl.estimator).mean())
            statistics |= {"kl weight": self.kl_weight, "kl of a completion": kl}
        return replace(
            rollout, advantage_NA=rollout.advantage_NA if by_reward else advantage_NT,
            statistics=rollout.statistics | statistics, value_NT=value_NT, return_NT=return_NT,
        )  # fmt: skip

    def steer(self, rollout: Experience) -> None:
        """Move the KL's weight by what a rollout's KL was.

        Raises:
            ValueError: the KL is not finite.
        """
        if self.rl.kl_target is not None:
            self.kl_weight = steered(
                self.kl_weight, float(rollout.kl_N(self.rl.estimator).mean()), len(rollout),
                self.rl.kl_target, self.rl.kl_horizon,
            )  # fmt: skip


def steered(weight: float, kl: float, samples: int, target: float, horizon: int) -> float:
    """beta (1 + clamp(KL/target - 1, -0.2, 0.2) min(samples/horizon, 1)), beta the weight.

    D. M. Ziegler et al., arXiv 1909.08593, 2.2; the minimum is ours: beta stays above 0.

    Args:
        kl: mean of `samples` completions of all ranks.
        target: KL in nats per completion.
        horizon: samples over which a full error moves beta by about a fifth.

    Raises:
        ValueError: kl is not finite.
    """
    if not math.isfinite(kl):
        raise ValueError(f"the KL to the reference is {kl}; the policy has diverged.")
    error = min(max(kl / target - 1, -_MAX_ERROR), _MAX_ERROR)
    return weight * (1 + error * min(samples / horizon, 1))


def _mean(values: Tensor) -> float:
    """0 of none."""
    return float(values.mean()) if len(values) else 0.0


def estimates(
    reward_N: Tensor, old_NT: Tensor, reference_NT: Tensor, value_NT: Tensor, mask_NT: Tensor, *,
    kl_weight: float, discount: float, decay: float, kl_estimator: KLEstimator = "k1",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Advantages and returns [N, T], 0 where the mask is 0; from `token_rewards` and `gae`.

    Advantages are whitened over all tokens of the rollout (mean 0, deviation 1). Returns are not.
    The reward of a completion that was cut by its length counts as that of one that ended: the
    reward function scored what is there, so no value is put behind it. A completion whose reward
    is NaN has advantage 0, is left out of the whitening, and its returns are NaN.

    Args:
        reference_NT: log-probability by the frozen reference; anything with kl_weight 0.
        mask_NT: 1 where the next token belongs to the completion: one run of ones in a row.

    Raises:
        ValueError: discount or decay lies outside [0, 1]; the mask has a hole.
    """
    scored_N1 = ~reward_N.isnan()[:, None]
    mask_NT = mask_NT.bool()
    place_NT = _places(mask_NT)
    moved = [x.gather(1, place_NT) for x in (old_NT, reference_NT, value_NT)]
    old, reference, value = (x.double() for x in moved)
    mask = mask_NT.gather(1, place_NT)
    reward = token_rewards(
        reward_N.nan_to_num(0.0).double(), old, reference, mask, kl_weight, kl_estimator
    )
    advantage, returns = gae(reward, value, mask, discount, decay)
    advantage = torch.where(mask & scored_N1, advantage, torch.nan)
    advantage = normalised(advantage.flatten()).view_as(advantage)
    returns = torch.where(scored_N1, returns, torch.nan)
    back = (torch.zeros_like(value).scatter(1, place_NT, x) for x in (advantage, returns))
    advantage_NT, return_NT = (x.to(value_NT.dtype) for x in back)
    return advantage_NT, return_NT


def _places(mask_NT: Tensor) -> Tensor:
    """Columns [N, T] in the order that puts each completion's first token at 0."""
    first_N1 = mask_NT.int().argmax(1, keepdim=True)
    length = mask_NT.shape[1]
    return (torch.arange(length, device=mask_NT.device) + first_N1) % length
