"""A step's projection: sketch, exchange, gram, weights, combine. Runs before Megatron's finalize.

Legend: B blocks, M rows of all ranks, R = M + 1 (the target last), S slots of this rank, K sketch.

Sketches sum over data ranks; grams sum over parameter shards. A block's sketch is the sum over all
ranks that hold a piece of it, so the gram does not depend on the layout.

With c the factor that Megatron's finalize applies to a summed buffer (1/data ranks, or 1/tokens),
row i is g_i = M c sum(its buffers), whose mean is exactly Megatron's gradient. Only ratios to c
matter here, and c itself is left to Megatron.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dr.config import DRConfig
from megatron_dr.mcore import compat
from megatron_dr.mcore.grad_rows import GradRows
from megatron_dr.projection import (
    CountSketch,
    ExactRows,
    Sketch,
    gram_of,
    norm_scale,
    report,
    split,
)


@dataclass(frozen=True)
class Layout:
    """Who takes part: fixed at attach.

    Attributes:
        blocks: block number of each of this rank's parameters.
        num_blocks: B, of the whole model.
        offsets, exact_size: where a parameter begins in its block, for exact rows.
        ranks_per_row: neighbours in the data group that form one row.
    """

    blocks: tuple[int, ...]
    num_blocks: int
    offsets: dict[int, int]
    exact_size: int
    ranks_per_row: int

    @property
    def num_row_groups(self) -> int:
        return dist.get_world_size(compat.data_group()) // self.ranks_per_row

    def own_blocks(self) -> slice:
        """The blocks that this rank answers for among its model-parallel peers."""
        group = compat.model_group()
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        each = -(-self.num_blocks // size)
        return slice(min(rank * each, self.num_blocks), min((rank + 1) * each, self.num_blocks))


@dataclass
class Projection:
    """What a step did. Tensors stay on the device.

    Attributes:
        weights_BM: of every row, before alpha and the norm rule.
        coefficients_BR: what each of the M rows and the target was multiplied by.
        gram_BRR: rows and target.
        finite_R: whether each row's sketch, and the target's, is finite.
        wire_bytes: payload that this rank sent for it.
    """

    weights_BM: torch.Tensor
    coefficients_BR: torch.Tensor
    gram_BRR: torch.Tensor
    finite_R: torch.Tensor
    wire_bytes: int


def project(
    rows: GradRows,
    config: DRConfig,
    layout: Layout,
    step: int,
    target_ratio: torch.Tensor,
    role_scale: float,
    with_target: bool,
) -> Projection:
    """Combine this rank's rows into Megatron's buffer, each block by its weights.

    Args:
        target_ratio: c_t / c, what the target's summed buffer is to be multiplied by to be the
            target gradient in the units of the general one.
        role_scale: (n_t + n_g) / n_g undoes that the schedule divided by all microbatches.
    """
    sketch = make_sketch(config, layout, step)
    device = rows.view(0, 0).device
    local_BRK = torch.zeros(layout.num_blocks, rows.num_slots + 1, sketch.size, device=device)
    rows.sketch_(local_BRK, sketch, layout.blocks, with_target)
    gram_BRR, finite_R, wire = exchange(local_BRK, layout, target_ratio)
    gram_BMM, cross_BM, target_sq_B = split(gram_BRR)
    weights_BM = config.feasible_set().weights(gram_BMM, cross_BM)
    scale_B = norm_scale(config.norm, gram_BMM, weights_BM, target_sq_B)
    alpha = config.target_share if with_target else 0.0
    general_BM = (1.0 - alpha) * scale_B[:, None] * weights_BM
    coefficients_BR = torch.cat([general_BM, general_BM.new_full((len(scale_B), 1), alpha)], 1)
    rows.combine_(
        _local(coefficients_BR, rows.num_slots, layout, target_ratio, with_target) * role_scale,
        layout.blocks,
    )
    return Projection(weights_BM, coefficients_BR, gram_BRR, finite_R, wire)


def make_sketch(config: DRConfig, layout: Layout, step: int) -> Sketch:
    """The step's sketch: the same function on every rank."""
    if config.exact:
        return ExactRows(layout.offsets, layout.exact_size)
    return CountSketch(config.sketch_size, config.seed * 1_000_003 + step)


def exchange(
    local_BRK: torch.Tensor, layout: Layout, target_ratio: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Local sketches [B, S+1, K] -> gram [B, R, R] of all rows on every rank, finite_R, bytes."""
    model_group, data_group = compat.model_group(), compat.data_group()
    num_model, num_data = dist.get_world_size(model_group), dist.get_world_size(data_group)
    slots, num_rows = local_BRK.shape[1] - 1, layout.num_row_groups * (local_BRK.shape[1] - 1)
    wire = 0
    if num_model > 1:
        dist.all_reduce(local_BRK, group=model_group)
        wire += 2 * (num_model - 1) * local_BRK.nbytes // num_model
    own = layout.own_blocks()
    mine_bRK = local_BRK[own].contiguous()
    gathered = mine_bRK.new_empty(num_data, *mine_bRK.shape)
    if mine_bRK.numel():
        dist.all_gather_into_tensor(gathered.view(-1), mine_bRK.view(-1), group=data_group)
        wire += (num_data - 1) * mine_bRK.nbytes
    # rows: sum over the ranks of a row; the target: over all
    general = gathered[:, :, :slots].unflatten(0, (-1, layout.ranks_per_row)).sum(1)
    general_bMK = general.transpose(0, 1).flatten(1, 2) * float(num_rows)
    target_b1K = gathered[:, :, slots:].sum(0) * target_ratio.to(gathered.dtype)
    rows_bRK = torch.cat([general_bMK, target_b1K], 1)
    gram_BRR = rows_bRK.new_zeros(
        layout.num_blocks, num_rows + 1, num_rows + 1, dtype=torch.float64
    )
    gram_BRR[own] = gram_of(rows_bRK)
    if num_model > 1:
        dist.all_reduce(gram_BRR, group=model_group)
        wire += 2 * (num_model - 1) * gram_BRR.nbytes // num_model
    finite_R = torch.isfinite(gram_BRR.diagonal(dim1=1, dim2=2)).all(0)
    return gram_BRR, finite_R, wire


def _local(
    coefficients_BR: torch.Tensor,
    slots: int,
    layout: Layout,
    target_ratio: torch.Tensor,
    with_target: bool,
) -> torch.Tensor:
    """Coefficients [B, S (+1)] of this rank's buffers: M w for its slots, alpha c_t/c for t."""
    num_rows = coefficients_BR.shape[1] - 1
    group = dist.get_rank(compat.data_group()) // layout.ranks_per_row
    local_BS = coefficients_BR[:, group * slots : (group + 1) * slots] * num_rows
    if not with_target:
        return local_BS
    return torch.cat([local_BS, coefficients_BR[:, -1:] * target_ratio], 1)


def metrics(projection: Projection) -> dict[str, torch.Tensor]:
    """Scalars of the whole model for the log, by their names there."""
    gram_BMM, cross_BM, target_sq_B = split(projection.gram_BRR)
    values = report(gram_BMM, cross_BM, target_sq_B, projection.weights_BM)
    return {
        "dr cos target": values["cos_target"],
        "dr cos general": values["cos_general"],
        "dr residual": values["residual"],
        "dr rows": values["effective_rows"],
    }
