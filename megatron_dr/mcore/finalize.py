"""A step's projection: gram, weights, combine. Runs before Megatron's finalize.

Legend: B blocks, M rows of all ranks, R = M + 1 (the target last), P buffers of all row groups.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_dr.config import DRConfig
from megatron_dr.mcore.exact_gram import ExactGram
from megatron_dr.mcore.layout import Gram, Layout
from megatron_dr.mcore.sketched_gram import SketchedGram
from megatron_dr.mcore.stopwatch import Stopwatch
from megatron_dr.projection import norm_scale

Dial = Callable[[torch.Tensor], "torch.Tensor | float"]


@dataclass
class Projection:
    """What a step did to the blocks that are projected. Tensors stay on the device.

    Attributes:
        weights_BM: of every row.
        direction_BR: d = J^T w, or with the target itself in it.
        update_BR: what the optimizer gets, (1 - alpha) s d + alpha t with s of the norm rule.
        gram_BRR: rows and target.
        finite_R: whether each of them is finite.
        alpha: of this step.
        error_sq_B: estimated squared error of a sketched gram, or None.
        wire_bytes: what this rank sent for it, beside Megatron's own reduction.
    """

    weights_BM: torch.Tensor
    direction_BR: torch.Tensor
    update_BR: torch.Tensor
    gram_BRR: torch.Tensor
    finite_R: torch.Tensor
    alpha: torch.Tensor | float
    error_sq_B: torch.Tensor | None
    wire_bytes: int


def project(
    source: ExactGram | SketchedGram,
    config: DRConfig,
    layout: Layout,
    mix_RP: torch.Tensor,
    step: int,
    dial: Dial,
    role_scale: torch.Tensor | float,
    watch: Stopwatch,
) -> Projection:
    """Combine the rows into Megatron's buffer, each block by its weights.

    A block that is not projected gets the rows' mean, which is Megatron's own gradient.

    Args:
        mix_RP: which buffers make which rows (`row_map`).
        dial: alpha, from the gram with the target's halves.
        role_scale: undoes that Megatron divides by what the other role's microbatches are too.
    """
    gram: Gram = source.gram(mix_RP, step, watch)
    watch.lap("exchange")
    rows, feasible_set = layout.row_map.num_rows, config.feasible_set()
    whole_BRR = gram.gram_BRR[: layout.projected]
    gram_BRR = whole_BRR[:, : rows + 1, : rows + 1]
    weights_BM = feasible_set.weights(gram_BRR[:, :rows, :rows], gram_BRR[:, :rows, rows])
    target_B1 = torch.full_like(weights_BM[:, :1], feasible_set.target_weight)
    direction_BR = torch.cat([weights_BM, target_B1], 1)
    scale_B = norm_scale(config.norm, gram_BRR, direction_BR)
    alpha = dial(whole_BRR)
    update_BR = (1.0 - alpha) * scale_B[:, None] * direction_BR
    update_BR[:, rows] += alpha
    watch.lap("solve")
    source.combine(layout.of_all_blocks(update_BR) @ mix_RP[: rows + 1] * role_scale)
    watch.lap("combine")
    error_sq_B = None if gram.error_sq_B is None else gram.error_sq_B[: layout.projected]
    return Projection(
        weights_BM, direction_BR, update_BR, gram_BRR, gram.finite_R[: rows + 1], alpha,
        error_sq_B, gram.wire_bytes,
    )  # fmt: skip
