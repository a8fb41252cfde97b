"""Direct preference optimisation: a loss on pairs, without rollouts.

Shape suffixes: P pairs, B completions, T tokens.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def completion_log_prob(log_prob_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Log-probability of whole completions [B]; 0 for one without tokens."""
    return torch.where(mask_BT.bool(), log_prob_BT, torch.zeros_like(log_prob_BT)).sum(1)


def dpo_loss(
    chosen_P: Tensor, rejected_P: Tensor, reference_chosen_P: Tensor, reference_rejected_P: Tensor,
    beta: float, label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(sum, count) over the pairs of DPO's loss (arXiv 2305.18290, eq. 7).

        l = -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h)
        h = (chosen - reference_chosen) - (rejected - reference_rejected)

    Args:
        chosen_P, rejected_P: from `completion_log_prob`, by the policy; the others by the frozen
            reference.
        label_smoothing: s, the chance that a pair's labels are swapped (conservative DPO,
            E. Mitchell, 2023).

    Raises:
        ValueError: beta is not above 0, or label_smoothing lies outside [0, 0.5).
    """
    if not beta > 0:
        raise ValueError(f"DPO's beta must be above 0, not {beta}.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"DPO's label smoothing must lie in [0, 0.5), not {label_smoothing}.")
    reference_P = (reference_chosen_P - reference_rejected_P).detach()
    margin_P = beta * (chosen_P - rejected_P - reference_P)
    loss_P = -(1 - label_smoothing) * logsigmoid(margin_P) - label_smoothing * logsigmoid(-margin_P)
    return loss_P.sum(), torch.tensor(len(loss_P), device=loss_P.device)
