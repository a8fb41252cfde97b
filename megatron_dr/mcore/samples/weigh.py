"""From a window's gram to each sample's coefficient: the same few lines in every mode.

A window is the set of samples that compete: of a microbatch, or of the whole step. With U_n the
gradient that sample n adds to Megatron's buffer (as scaled there), the rows and the target are

    g_i = M U_i ,  t = ratio * sum of the target samples' U_v ,    map [R, N]: (g, t) = map U

so that the rows' mean is Megatron's own gradient of the window and t is of the same unit. The
update sum_r u_r (g, t)_r gives sample n the coefficient scale * sum_r u_r map[r, n], scale undoing
that Megatron divides by the other role's microbatches or tokens too.
"""

from dataclasses import dataclass

import torch

from megatron_dr.config import DRConfig
from megatron_dr.projection import alpha_at, norm_scale


@dataclass
class Solved:
    """Of B blocks (or windows) at once; float64 on the device.

    Attributes:
        gram_BRR: rows and target.
        weights_BM: of the rows.
        direction_BR: d = J^T w, or with the target itself in it.
        update_BR: (1 - alpha) s d + alpha t, s of the norm rule.
    """

    gram_BRR: torch.Tensor
    weights_BM: torch.Tensor
    direction_BR: torch.Tensor
    update_BR: torch.Tensor


def needs_rows(dr: DRConfig) -> bool:
    """Whether products of rows with rows are needed, beside those with the target."""
    return dr.set not in ("mean", "target", "topk", "filter") or dr.norm in ("general", "target")


def solve(
    dr: DRConfig, gram_BRR: torch.Tensor, share_M: torch.Tensor, alpha: float,
    weights_BM: torch.Tensor | None = None,
) -> Solved:  # fmt: skip
    """Weights and update of each block.

    Args:
        share_M: each row's share of the window's tokens.
        weights_BM: given, they are not solved for.
    """
    gram_BRR = gram_BRR.double()
    feasible_set = dr.feasible_set()
    if weights_BM is None:
        weights_BM = feasible_set.weights(gram_BRR[:, :-1, :-1], gram_BRR[:, :-1, -1])
    target_B1 = torch.full_like(weights_BM[:, :1], feasible_set.target_weight)
    direction_BR = torch.cat([weights_BM, target_B1], 1)
    scale_B = norm_scale(dr.norm, gram_BRR, direction_BR, share_M.to(gram_BRR))
    update_BR = (1.0 - alpha) * scale_B[:, None] * direction_BR
    update_BR[:, -1] += alpha
    return Solved(gram_BRR, weights_BM, direction_BR, update_BR)


def alpha_of(dr: DRConfig, step: int) -> float:
    """alpha of a step; the set `target` is alpha = 1."""
    if dr.set == "target":
        return 1.0
    return alpha_at(dr.alpha_style, dr.alpha, dr.end_alpha, step, dr.alpha_steps or 1)


def sample_map(
    general: int, targets: int, ratio: float, device: torch.device, count: int | None = None
) -> torch.Tensor:
    """map [R, N] of a microbatch: `general` samples, then `targets` ones (float64).

    Args:
        count: how many of the general samples there are (the first ones); the others' rows are 0.
    """
    count = general if count is None else count
    map_RN = torch.zeros(general + 1, general + targets, dtype=torch.float64, device=device)
    map_RN[:count, :count] = count * torch.eye(count, dtype=torch.float64, device=device)
    map_RN[general, general:] = ratio
    return map_RN


def kept(dr: DRConfig, coefficient_N: torch.Tensor, targets: int, alpha: float) -> torch.Tensor:
    """Numbers of the samples whose coefficient is not 0, in order.

    On a GPU their number must be known without asking it: of `topk` and `greedy` it is; with
    other sets every sample is kept.
    """
    if coefficient_N.device.type == "cpu":
        return coefficient_N.nonzero().flatten()
    if dr.set not in ("topk", "greedy") or dr.window != "microbatch":
        return torch.arange(len(coefficient_N), device=coefficient_N.device)
    general = len(coefficient_N) - targets
    count = max(1, round(dr.fraction * general)) + (targets if alpha > 0 else 0)
    return coefficient_N.abs().topk(count).indices.sort().values
