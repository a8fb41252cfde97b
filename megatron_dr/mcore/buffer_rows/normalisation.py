"""What each role's summed gradient is divided by, where Megatron divides all of them alike.

Megatron's finalize multiplies a summed buffer by c: 1 / data ranks, or with a per-token loss
1 / tokens of the step; without one, the schedule has divided each microbatch's loss by the number
of microbatches. A role has its own count. So with n_t and n_g microbatches (tokens) of the roles

| | target's factor c_t / c | role scale |
|---|---|---|
| per token; c is 1 / general tokens | general tokens / target tokens | 1 |
| per token, but no loss brings a token count: Megatron divides as in the next row | | |
| ranks run both roles; losses were divided by n_t + n_g | n_g / n_t | (n_t + n_g) / n_g |
| G_t of G row groups run the target alone, G_g the others | G_g / G_t | G / G_g |

The role scale multiplies the update: it undoes a division by what is the other role's too.

Legend: D domains.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from megatron.core import parallel_state

from megatron_dr.mcore import collectives, compat, constants
from megatron_dr.mcore.buffer_rows.router import RoleRouter
from megatron_dr.mcore.buffer_rows.row_map import RowMap


class Factors(NamedTuple):
    """c_t / c in float64, the role scale, and with domain rows each domain's share."""

    ratio: torch.Tensor
    role_scale: torch.Tensor | float
    share_D: torch.Tensor | None


def factors(router: RoleRouter, row_map: RowMap, per_token: bool, device: torch.device) -> Factors:
    """Of a step (collective where tokens or domains are counted)."""
    n_t, n_g, groups = router.num_target, router.num_general, row_map.target_groups
    share_D = None
    if per_token or row_map.by_domain:
        amounts = _total(router.tokens if per_token else router.microbatches, device)
        general, target = amounts[:-1].sum(), amounts[-1]
        if row_map.by_domain:
            share_D = amounts[:-1] / general
    if groups:  # each rank divided by its own microbatches, Megatron divides by all ranks
        others = row_map.groups - groups
        ratio, role_scale = others / groups, row_map.groups / others
    else:  # each microbatch was divided by n_t + n_g
        ratio, role_scale = n_g / n_t if n_t else 0.0, (n_t + n_g) / n_g
    by_microbatch = constants.scalar(ratio, device)
    if not per_token:
        return Factors(by_microbatch, role_scale, share_D)
    counted = amounts.sum() > 0
    return Factors(
        torch.where(counted, general / target.clamp(min=1), by_microbatch),
        torch.where(counted, 1.0, constants.scalar(role_scale, device)), share_D,
    )  # fmt: skip


def general_tokens(router: RoleRouter, like: torch.Tensor) -> torch.Tensor:
    """This rank's tokens of the general role, as Megatron's own count is kept."""
    return (torch.zeros_like(like) + sum(router.tokens[:-1])).to(like.dtype)


def _total(amounts: Sequence[torch.Tensor | int], device: torch.device) -> torch.Tensor:
    """Microbatches, or tokens, by domain and of the target, over all data ranks, float64."""
    counts = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=device) for n in amounts])
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    if not last or parallel_state.get_tensor_model_parallel_rank() != 0:
        counts.zero_()  # one rank of a model copy counts
    collectives.all_reduce(counts, compat.model_group())
    collectives.all_reduce(counts, compat.data_group())
    return counts
