"""What the plugin says: once at attach, and when a gradient is not finite. On rank 0."""

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dr.config import DRConfig
from megatron_dr.mcore.finalize import Layout, Projection
from megatron_dr.mcore.grad_rows import GradRows

# What a set is when M = 1.
_ONE_ROW = {
    "topk": "topk keeps it: standard training",
    "capped": "capped gives it weight 1: standard training",
    "hull": "hull gives it weight 1: standard training",
    "cone": "cone keeps its direction where it agrees with the target, else stops it",
    "span": "span keeps its line, with the target's sign",
}


def attached(dr: DRConfig, rows: GradRows, layout: Layout) -> None:
    """What will be projected, and what it costs."""
    if dist.get_rank() != 0:
        return
    num_rows = layout.num_row_groups * dr.num_slots
    elements = sum(o.parameter.numel() for o in rows.owned)
    target = elements * rows.owned[0].parameter.main_grad.element_size()
    _say(
        f"set {dr.set}, {num_rows} rows a step ({dr.rows}), {layout.num_blocks} block(s) "
        f"({dr.blocks}), alpha {dr.target_share}, norm {dr.norm}; this rank keeps "
        f"{rows.extra_bytes:,} bytes for slots and, with a target batch, {target:,} for the target"
    )
    if num_rows == 1 and dr.set in _ONE_ROW:
        _say(f"note: one row: {_ONE_ROW[dr.set]}")


def not_finite(projection: Projection, num_slots: int, layout: Layout, step: int) -> None:
    """Whose gradient has NaN or Inf; what happens to the step is Megatron's decision.

    Reads the device.
    """
    if dist.get_rank() != 0:
        return
    rows = projection.finite_R.tolist()
    for row, finite in enumerate(rows):
        if finite:
            continue
        group, slot = divmod(row, num_slots)
        first = group * layout.ranks_per_row // parallel_state.get_context_parallel_world_size()
        who = f"the general gradient of data-parallel rank {first}, slot {slot},"
        if row == len(rows) - 1:
            who = "the target's gradient"
        _say(f"step {step}: {who} has NaN or Inf")


def _say(sentence: str) -> None:
    print(f"megatron_dr: {sentence}", flush=True)
