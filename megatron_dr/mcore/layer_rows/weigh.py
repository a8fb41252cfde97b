"""From a window's gram to each sample's coefficient: the same few lines in every mode.

A window is the set of samples that compete: of a microbatch, or of the whole step. With U_n the
gradient that sample n adds to Megatron's buffer (as scaled there), the rows and the target are

    g_i = M U_i ,  t = ratio * sum of the target samples' U_v ,    map [R, N]: (g, t) = map U

so that the rows' mean is Megatron's own gradient of the window and t is of the same unit. The
update sum_r u_r (g, t)_r gives sample n the coefficient scale * sum_r u_r map[r, n], scale undoing
that Megatron divides by the other role's microbatches or tokens too.
"""

import torch

from megatron_dr.config.dr import DRConfig


def needs_rows(dr: DRConfig) -> bool:
    """Whether products of rows with rows are needed, beside those with the target."""
    reads = dr.feasible_set().reads_rows or dr.alpha_style == "auto"
    return reads or dr.norm in ("general", "target")


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


def _can_ask(values: torch.Tensor) -> bool:
    """Whether their number can be known without waiting for a device."""
    return values.device.type == "cpu"


def kept(dr: DRConfig, coefficient_N: torch.Tensor, targets: int, alpha: float) -> torch.Tensor:
    """Numbers of the samples whose coefficient is not 0, in order.

    On a GPU their number must be known without asking it: where the set knows it; else every
    sample is kept.
    """
    if _can_ask(coefficient_N):
        return coefficient_N.nonzero().flatten()
    count = dr.feasible_set().kept(len(coefficient_N) - targets)
    if count is None or dr.window != "microbatch" or dr.beta > 0:
        return torch.arange(len(coefficient_N), device=coefficient_N.device)
    count += targets if alpha > 0 else 0
    return coefficient_N.abs().topk(count).indices.sort().values
