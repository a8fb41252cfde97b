"""The two halves of a step's target samples, for the rule that chooses alpha and beta.

t = (t_A + t_B)/2 and e = (t_A - t_B)/2, so e is the sum that t is, with a sign for each sample.
"""

import torch
from megatron.core import parallel_state

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore.step.rows import Call


def signs(dr: DRConfig, call: Call, merged: int) -> list[list[float]]:
    """+1 for half A, -1 for half B, of this rank's target microbatches and, where the target is
    merged, the samples in each (else one entry for all); empty where there are no two halves.

    Microbatches are halved where their number is even, of each target set, else a merged one's
    samples, else ranks.
    """
    samples, microbatches = merged or 1, call.num_target
    if dr.alpha_style != "auto" or not dr.can_choose_alpha or not microbatches:
        return []
    if not call.no_halves:
        return [[_sign(n, microbatches)] * samples for n in range(microbatches)]
    if merged and merged % 2 == 0:
        return [[_sign(n, merged) for n in range(merged)]] * microbatches
    ranks = parallel_state.get_data_parallel_world_size()
    if ranks % 2 == 0:
        sign = 1.0 - 2.0 * (parallel_state.get_data_parallel_rank() % 2)
        return [[sign] * samples] * microbatches
    return []


def _sign(number: int, count: int) -> float:
    return 1.0 if number < count // 2 else -1.0


def lacks(dr: DRConfig, rows: int, sign_nq: list[list[float]]) -> str:
    """Why alpha and beta can't be chosen from a step's gram; empty where they can, or are not."""
    if dr.alpha_style != "auto":
        return ""
    if not dr.can_choose_alpha:
        return (
            "sample rows take the target's gradient in before all is known that alpha depends on "
            "(with --dr-window step, and --dr-passes 2 or --dr-target-pass merged, they don't)"
        )
    if rows < 2 and dr.weighs_rows:
        return "a step has one sample, which leaves a projection nothing to choose"
    if not sign_nq:
        return "the target samples of a step make no two halves (--dr-target-batch-size)"
    return ""


def difference(
    sign_nq: list[list[float]], ratio: list[float], parts: list[torch.Tensor]
) -> torch.Tensor:
    """e [K] of merged target samples' features, a part [q, K] for each microbatch."""
    found = torch.zeros_like(parts[0][0])
    for signs_q, scale, part in zip(sign_nq, ratio, parts, strict=True):
        found += scale * part.new_tensor(signs_q) @ part
    return found
