"""--dr-targets maximin: the gram of a step with K target sets as one with the target of them all.

Legend: B blocks, K target sets, R = M rows and the targets, Q = M rows and the target, P vectors of
all ranks (`row_map.py`).
"""

import itertools

import torch

from megatron_dr.mcore.buffer_rows.layout import Gram
from megatron_dr.mcore.buffer_rows.row_map import RowMap
from megatron_dr.mcore.step.rows import Call
from megatron_dr.projection.min_norm import min_norm


def check(row_map: RowMap, call: Call) -> None:
    """Raise ValueError where a step's target microbatches don't fill the sets' buffers in turn."""
    if row_map.targets == 1:
        return
    sets = call.sets
    runs = [] if sets is None else [k for k, _ in itertools.groupby(sets.of)]
    alike = sets is not None and len(set(sets.weights)) == 1
    if runs != list(range(row_map.targets)) or not alike:
        raise ValueError(
            f"targets='maximin' of {row_map.targets} target sets needs target_sets in each step, "
            "with the microbatches of one set after those of the other, and equal weights."
        )


def of_one(
    gram: Gram, mix_RP: torch.Tensor, rows: int, projected: int
) -> tuple[Gram, torch.Tensor, torch.Tensor]:
    """The gram and mix [Q, P] of the rows and the sets' mean, and the weights [K] of that mean.

    The weights are the whole model's: a set's gain is the sum over its blocks.

    Args:
        rows: M.
        projected: blocks that are, the first ones.
    """
    targets = slice(rows, None)
    weights_K = min_norm(gram.gram_BRR[:projected, targets, targets].sum(0))
    whole_QR = torch.eye(rows + 1, len(mix_RP), dtype=mix_RP.dtype, device=mix_RP.device)
    whole_QR[rows, targets] = weights_K
    gram_BQQ = whole_QR @ gram.gram_BRR @ whole_QR.T
    finite_Q = torch.cat([gram.finite_R[:rows], gram.finite_R[targets].all()[None]])
    return Gram(gram_BQQ, finite_Q, gram.error_sq_B), whole_QR @ mix_RP, weights_K
