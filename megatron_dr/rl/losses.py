"""Losses of policies and values on completions, each a (sum, count).

Log-probabilities are natural logarithms of the sampled tokens. Divide the sums over all
microbatches and ranks by the counts over them. A count of 0 comes with a sum of 0.

Shape suffixes: B completions, T tokens. Advantages may be [B, 1]: one for a completion.
"""

from typing import Literal

import torch
from torch import Tensor

from megatron_dr.rl.weights import TokenWeights

KLEstimator = Literal["k1", "k2", "k3"]


def policy_loss(
    log_prob_BT: Tensor, old_log_prob_BT: Tensor, advantage_BT: Tensor, weights: TokenWeights,
    clip: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Clipped ratio loss (PPO, arXiv 1707.06347, eq. 7; GRPO uses it too).

        l = -min(r A, clamp(r, 1 - clip, 1 + clip) A),   r = exp(log_prob - old_log_prob)

    Args:
        old_log_prob_BT: of the policy that sampled; no gradient flows into it.
        clip: above 0.

    Raises:
        ValueError: clip is not above 0; the advantages have one dimension.
    """
    if not clip > 0:
        raise ValueError(f"clip must be above 0, not {clip}.")
    ratio_BT = weights.keep(log_prob_BT - old_log_prob_BT.detach()).exp()
    advantage_BT = weights.keep(_by_token(advantage_BT, ratio_BT))
    clipped_BT = ratio_BT.clamp(1 - clip, 1 + clip)
    return weights.total(-torch.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT))


def kl_estimates(d_BT: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimates of KL(p | q) by samples of p, with d = log q - log p at each.

        k1 = -d,   k2 = d^2 / 2,   k3 = exp(d) - d - 1

    The means of k1 and k3 over p are the KL, that of k2 is near it where p and q are; k2 and k3
    are at least 0. As a loss, k2 has on average the gradient of KL(p | q), k3 that of KL(q | p),
    and k1 none.

    J. Schulman, "Approximating KL divergence" (2020); k3 in GRPO, arXiv 2402.03300, eq. 4.

    Raises:
        ValueError: an unknown estimator.
    """
    if estimator == "k1":
        return -d_BT
    if estimator == "k2":
        return 0.5 * d_BT.square()
    if estimator == "k3":
        return torch.expm1(d_BT) - d_BT
    raise ValueError(f"a KL estimator is 'k1', 'k2' or 'k3', not {estimator!r}.")


def kl_loss(
    log_prob_BT: Tensor, reference_log_prob_BT: Tensor, weights: TokenWeights,
    estimator: KLEstimator = "k3",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The estimate of KL(policy | reference) on the policy's samples, see `kl_estimates`."""
    d_BT = weights.keep(reference_log_prob_BT.detach() - log_prob_BT)
    return weights.total(kl_estimates(d_BT, estimator))


def value_loss(
    value_BT: Tensor, old_value_BT: Tensor, return_BT: Tensor, weights: TokenWeights, clip: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped value loss: a value may not gain by moving more than `clip`.

        l = 1/2 max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2)

    Args:
        old_value_BT: when the completions were sampled.
        clip: above 0, in units of the values.

    Raises:
        ValueError: clip is not above 0.
    """
    if not clip > 0:
        raise ValueError(f"the value clip must be above 0, not {clip}.")
    value_BT = weights.keep(value_BT)
    old_BT, return_BT = weights.keep(old_value_BT.detach()), weights.keep(return_BT.detach())
    clipped_BT = old_BT + (value_BT - old_BT).clamp(-clip, clip)
    squares_BT = torch.maximum((value_BT - return_BT).square(), (clipped_BT - return_BT).square())
    return weights.total(0.5 * squares_BT)


def gradient_loss(
    log_prob_BT: Tensor, signal_BT: Tensor, weights: TokenWeights
) -> tuple[Tensor, Tensor]:
    """The target losses `reward` and `token-pg`: l = -S log_prob.

    S is the normalised reward of the completion, or the advantage of the token that training has.
    Its gradient is that of -E[S] by the policy gradient theorem (Dr. Post-Training,
    arXiv 2605.07063).

    Args:
        signal_BT: from `advantages.normalised`, or advantages; may be [B, 1].

    Raises:
        ValueError: the rewards have one dimension.
    """
    signal_BT = weights.keep(_by_token(signal_BT, log_prob_BT))
    return weights.total(-signal_BT * weights.keep(log_prob_BT))


def _by_token(signal_BT: Tensor, like_BT: Tensor) -> Tensor:
    """A signal at each token, without a gradient; [B] would be spread along T where B = T."""
    if signal_BT.ndim != like_BT.ndim:
        raise ValueError(
            f"advantages and rewards must be [B, T] or [B, 1], not {list(signal_BT.shape)}."
        )
    return signal_BT.detach().expand_as(like_BT)
