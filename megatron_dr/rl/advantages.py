"""Advantages of completions: normalised rewards, by group or of a batch, and GAE.

Shape suffixes: B completions, T tokens (right-padded), G groups.
"""

import torch
from torch import Tensor

from megatron_dr.rl.losses import KLEstimator, kl_estimates

_FLOOR = 1e-4  # added to a standard deviation: rewards that differ by rounding stay small


def group_advantages(reward_B: Tensor, group_B: Tensor) -> Tensor:
    """A_b = (r_b - mean_g) / (std_g + 1e-4) over b's group g, [B] (GRPO, arXiv 2402.03300, 4.1.2).

    std is the sample deviation (over n - 1). A group of equal rewards, or of one, gives exactly 0.
    A NaN reward is a sample that was not scored: it is left out of its group, and gets 0.

    Args:
        group_B: integers from 0; completions of one prompt share one.
    """
    scored_B = ~reward_B.isnan()
    r_B = torch.where(scored_B, reward_B, torch.zeros_like(reward_B)).double()
    low_B = torch.where(scored_B, r_B, torch.full_like(r_B, torch.inf))
    high_B = torch.where(scored_B, r_B, torch.full_like(r_B, -torch.inf))
    empty_G = r_B.new_zeros(int(group_B.max()) + 1 if group_B.numel() else 0)
    n_G = empty_G.index_add(0, group_B, scored_B.double())
    mean_G = empty_G.index_add(0, group_B, r_B) / n_G.clamp(min=1)
    centred_B = torch.where(scored_B, r_B - mean_G[group_B], torch.zeros_like(r_B))
    variance_G = empty_G.index_add(0, group_B, centred_B.square()) / (n_G - 1).clamp(min=1)
    # a mean of equal numbers may be off by rounding
    low_G = empty_G.scatter_reduce(0, group_B, low_B, "amin", include_self=False)
    high_G = empty_G.scatter_reduce(0, group_B, high_B, "amax", include_self=False)
    advantage_B = centred_B / (variance_G.sqrt() + _FLOOR)[group_B]
    differs_B = (high_G > low_G)[group_B]
    return torch.where(differs_B, advantage_B, torch.zeros_like(r_B)).to(reward_B.dtype)


def normalised(reward_B: Tensor) -> Tensor:
    """Rewards of a whole batch as one group: mean 0, deviation 1. Gather over data ranks first."""
    return group_advantages(reward_B, torch.zeros_like(reward_B, dtype=torch.long))


def token_rewards(
    reward_B: Tensor, log_prob_BT: Tensor, reference_log_prob_BT: Tensor, mask_BT: Tensor,
    kl_weight: float, kl_estimator: KLEstimator = "k1",
) -> Tensor:  # fmt: skip
    """RLHF's rewards by token [B, T]: the reward at the last token, less the KL's terms.

        r_t = [t is last] r - kl_weight k_t,   k1_t = log_prob_t - reference_log_prob_t

    D. M. Ziegler et al., arXiv 1909.08593, eq. 2; k2 and k3 in `losses.kl_estimates`. A completion
    without tokens gets no reward.
    """
    mask_BT = mask_BT.bool()
    d_BT = (reference_log_prob_BT - log_prob_BT).detach()
    d_BT = torch.where(mask_BT, d_BT, torch.zeros_like(d_BT))  # an estimate of 0 is 0
    penalty_BT = kl_estimates(d_BT, kl_estimator)
    following_BT = torch.cat([mask_BT[:, 1:], torch.zeros_like(mask_BT[:, :1])], 1)
    is_last_BT = mask_BT & ~following_BT
    score_BT = torch.where(is_last_BT, reward_B[:, None], torch.zeros_like(penalty_BT))
    return score_BT - kl_weight * penalty_BT


def gae(
    reward_BT: Tensor, value_BT: Tensor, mask_BT: Tensor, discount: float, decay: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns, [B, T] each, 0 at padding (arXiv 1506.02438).

        delta_t = r_t + discount V_{t+1} - V_t,   A_t = delta_t + discount decay A_{t+1}
        return_t = A_t + V_t

    Args:
        mask_BT: completions begin at token 0 and are right-padded.
        discount, decay: gamma and lambda, from 0 to 1.

    Raises:
        ValueError: discount or decay lies outside [0, 1]; the mask has a hole.
    """
    if not (0 <= discount <= 1 and 0 <= decay <= 1):
        raise ValueError(f"discount {discount} and decay {decay} of GAE must lie in [0, 1].")
    mask_BT = mask_BT.bool()
    if bool((mask_BT[:, 1:] & ~mask_BT[:, :-1]).any()):
        raise ValueError("GAE's mask must be right-padded: ones, then zeros, in every row.")
    zeros_BT = torch.zeros_like(value_BT)
    value_BT = torch.where(mask_BT, value_BT.detach(), zeros_BT)
    reward_BT = torch.where(mask_BT, reward_BT, zeros_BT)
    next_BT = torch.cat([value_BT[:, 1:], zeros_BT[:, :1]], 1)
    delta_BT = reward_BT + discount * next_BT - value_BT
    advantage_BT, following_B = zeros_BT.clone(), zeros_BT.new_zeros(len(zeros_BT))
    for t in reversed(range(delta_BT.shape[1])):  # padding lies behind, and adds 0
        following_B = delta_BT[:, t] + discount * decay * following_B
        advantage_BT[:, t] = following_B
    return advantage_BT, advantage_BT + value_BT
