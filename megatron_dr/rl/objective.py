"""The loss of a microbatch of completions, of either role, and what of it is logged."""

import torch
from torch import Tensor

from megatron_dr.config.rl import RLConfig
from megatron_dr.rl.losses import gradient_loss, kl_loss, policy_loss, value_loss
from megatron_dr.rl.weights import TokenWeights


def objective(
    log_prob_BT: Tensor, value_BT: Tensor | None, batch: dict[str, Tensor], rl: RLConfig
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum, tokens) of the loss, and pairs (sum, count) for the log by name.

    `tokens` is all of the microbatch's, padding too: what Megatron divides by must be what routers
    of experts multiply their auxiliary losses with. `ExperienceStream` has the weights in that
    unit.

    Completions with `plain` have `gradient_loss`, the others `policy_loss` with GRPO's KL or,
    with values, PPO's `value_loss`. Completions whose return is NaN have no value loss. The log's
    `kl` is k3, whatever the estimator.

    Args:
        log_prob_BT: log-probability of the next token.
        value_BT: from the value head; None without one.
        batch: from `Experience.batch`.
    """
    weights = TokenWeights(batch["weight"], batch["loss_mask"])
    plain_B1 = batch["plain"]
    by_policy = weights.map(lambda x_BT: x_BT * ~plain_B1)
    plain = weights.map(lambda x_BT: x_BT * plain_B1)
    old_BT, advantage_BT = batch["old_log_prob"], batch["advantage"]
    policy, _ = policy_loss(log_prob_BT, old_BT, advantage_BT, by_policy, rl.clip)
    gradient, _ = gradient_loss(log_prob_BT, advantage_BT, plain)
    loss, count = policy + gradient, weights.count_BT.sum()
    report = {"policy loss": loss.detach(), "clipped": _clipped(
        log_prob_BT, old_BT, advantage_BT, by_policy, rl.clip)}  # fmt: skip
    if rl.kl > 0:
        reference_BT = batch["reference_log_prob"]
        if rl.kl_of_loss > 0:
            kl, _ = kl_loss(log_prob_BT, reference_BT, by_policy, rl.estimator)
            loss = loss + rl.kl_of_loss * kl
        report["kl"] = kl_loss(log_prob_BT.detach(), reference_BT, weights)[0]
    if value_BT is not None:
        return_BT = batch["return"]
        valued = by_policy.map(lambda x_BT: x_BT * ~return_BT.isnan())
        value, _ = value_loss(value_BT, batch["value"], return_BT, valued, rl.value_clip)
        loss = loss + rl.value_weight * value
        report["value loss"] = value.detach()
    pairs = {name: torch.stack([value, count.to(value)]) for name, value in report.items()}
    if value_BT is not None:  # the others have none
        pairs["value loss"][1] = by_policy.count_BT.sum()
    tokens = torch.tensor(log_prob_BT.numel(), dtype=torch.int, device=log_prob_BT.device)
    return loss, tokens, pairs


def _clipped(
    log_prob_BT: Tensor, old_BT: Tensor, advantage_BT: Tensor, weights: TokenWeights, clip: float
) -> Tensor:
    """Weight of the tokens whose gradient the clip takes away."""
    ratio_BT = weights.keep((log_prob_BT - old_BT).detach()).exp()
    up_BT = (ratio_BT > 1 + clip) & (advantage_BT > 0)
    down_BT = (ratio_BT < 1 - clip) & (advantage_BT < 0)
    clipped_BT = (up_BT | down_BT).to(ratio_BT)
    return weights.total(torch.where(ratio_BT.isnan(), ratio_BT, clipped_BT))[0]
