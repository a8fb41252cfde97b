"""The loss of a microbatch of completions, of either role, and what of it is logged."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dr.rl.losses import kl_loss, policy_loss, reward_loss
from megatron_dr.rl.weights import TokenWeights

Report = dict[str, Tensor]


def objective(
    log_prob_BT: Tensor, batch: dict[str, Tensor], clip: float, kl_weight: float
) -> tuple[Tensor, Tensor, Report]:
    """(sum, count) of the loss, and pairs (sum, count) for the log by name.

    Completions with `by_reward` have `reward_loss`, the others `train_loss`.

    Args:
        log_prob_BT: log-probability of the next token.
        batch: from `Experience.batch`.

    Raises:
        ValueError: clip is not above 0.
    """
    weights = TokenWeights(batch["weight"], batch["loss_mask"])
    by_reward_B1 = batch["by_reward"]
    by_policy = weights.map(lambda x_BT: x_BT * ~by_reward_B1)
    by_reward = weights.map(lambda x_BT: x_BT * by_reward_B1)
    old_BT, advantage_B1 = batch["old_log_prob"], batch["advantage"]
    policy, _ = policy_loss(log_prob_BT, old_BT, advantage_B1, by_policy, clip)
    reward, _ = reward_loss(log_prob_BT, advantage_B1, by_reward)
    loss, count = policy + reward, weights.count_BT.sum()
    report = {"policy loss": loss.detach(), "clipped": _clipped(
        log_prob_BT, old_BT, advantage_B1, by_policy, clip)}  # fmt: skip
    if kl_weight > 0:
        reference_BT = batch["reference_log_prob"]
        loss = loss + kl_weight * kl_loss(log_prob_BT, reference_BT, by_policy)[0]
        report["kl"] = kl_loss(log_prob_BT.detach(), reference_BT, weights)[0]
    pairs = {name: torch.stack([value, count.to(value)]) for name, value in report.items()}
    return loss, count.to(torch.int), pairs


def _clipped(
    log_prob_BT: Tensor, old_BT: Tensor, advantage_B1: Tensor, weights: TokenWeights, clip: float
) -> Tensor:
    """Weight of the tokens whose gradient the clip takes away."""
    ratio_BT = weights.keep((log_prob_BT - old_BT).detach()).exp()
    up_BT = (ratio_BT > 1 + clip) & (advantage_B1 > 0)
    down_BT = (ratio_BT < 1 - clip) & (advantage_B1 < 0)
    return weights.total((up_BT | down_BT).to(ratio_BT))[0]
