"""What a sample's gradient in Megatron's buffer is worth: the units of rows, target and update.

Megatron scales a microbatch's loss before its backward, so what a sample adds to the buffer is
U = factor x (the gradient of its summed token losses). With T tokens in all, n microbatches in the
schedule call and D data ranks,

| loss | factor | Megatron's gradient |
|---|---|---|
| mean of each microbatch | 1 / (T of the microbatch x n) | mean over data ranks of sum U |
| per token | 1 | sum U of all ranks / T |

The target is kept as its own mean gradient; `ratio` brings it to the unit of a window's sum of U.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dr.mcore.layer_rows.microbatches import Microbatches, total


@dataclass(frozen=True)
class Factors:
    """Of one schedule call with n_t target and n_g general microbatches.

    Attributes:
        ratio: by general microbatch: of the target to the window's sum of U.
        row_scale: by general microbatch: of its samples' U, so that all microbatches are alike.
        scale: of every coefficient: undoes Megatron's division by the target's microbatches.
        to_mean: makes the sum of the target's U over all ranks its mean gradient.
        target_scale: of the target's own U where it enters the update with alpha = 1.
    """

    ratio: list[float]
    row_scale: list[float]
    scale: float
    to_mean: float
    target_scale: float


def factors(batches: Microbatches, num_target: int, per_token: bool, whole: bool) -> Factors:
    """The units of a schedule call (collective where the loss is per token).

    Args:
        num_target: target microbatches that this call runs by themselves.
        whole: whether the window is the whole step.
    """
    tokens, target_tokens = batches.tokens, batches.target_tokens
    general_n = tokens.sum(1)
    n_g, ranks = len(general_n), dist.get_world_size(parallel_state.get_data_parallel_group())
    T_g = T_t = 1.0
    if per_token:
        T_g, T_t = (max(float(total(t)), 1.0) for t in (tokens, target_tokens))
    ones = [1.0] * n_g
    if batches.merged:
        target_n = target_tokens.sum(1).clamp(min=1)
        if per_token:
            ratio_n = torch.full_like(general_n, T_g / T_t) if whole else general_n / target_n
            return Factors(ratio_n.tolist(), ones, 1.0, 1.0, 0.0)
        scale_n = (general_n + target_n) / general_n.clamp(min=1)
        return Factors((general_n / target_n).tolist(), scale_n.tolist(), 1.0, 1.0, 0.0)
    if per_token:
        ratio_n = torch.full_like(general_n, T_g) if whole else general_n
        return Factors(ratio_n.tolist(), ones, 1.0, 1.0 / T_t, T_g / T_t)
    n = num_target + n_g
    to_mean = n / (num_target * ranks) if num_target else 0.0
    target_scale = n / num_target if num_target else 0.0
    ratio = n_g * ranks / n if whole else 1.0 / n
    return Factors([ratio] * n_g, ones, n / n_g, to_mean, target_scale)
