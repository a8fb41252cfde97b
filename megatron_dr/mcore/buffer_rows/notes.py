"""What the plugin says: once at attach, and when a gradient is not finite. On rank 0."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore.buffer_rows.buffers import Buffers
from megatron_dr.mcore.buffer_rows.layout import Layout
from megatron_dr.mcore.say import say


def attached(dr: DRConfig, buffers: Buffers, layout: Layout, target_bytes: int, why: str) -> None:
    """What will be projected, and what it costs."""
    num_rows, feasible_set = layout.row_map.num_rows, dr.feasible_set()
    alpha = f"alpha {_alpha(dr)}, " if feasible_set.alpha is None else ""
    alpha += f"beta {dr.beta}, " if dr.beta else ""
    say(
        f"set {dr.set}, {num_rows} rows a step ({dr.rows}), {layout.projected} block(s) "
        f"({dr.blocks}), {alpha}norm {dr.norm}; this rank keeps "
        f"{buffers.extra_bytes:,} bytes for slots and, with a target batch, "
        f"{target_bytes:,} for the target"
    )
    say(why)
    if num_rows == 1 and feasible_set.one_row:
        say(f"note: one row: {feasible_set.one_row}")


def _alpha(dr: DRConfig) -> str:
    if dr.alpha_style in ("linear", "cosine"):
        return f"{dr.alpha} to {dr.end_alpha} ({dr.alpha_style})"
    return str(dr.alpha) if dr.alpha_style == "constant" else "auto"


def not_finite(finite_R: torch.Tensor, layout: Layout, dr: DRConfig, step: int) -> None:
    """Whose gradient has NaN or Inf; what happens to the step is Megatron's decision.

    Reads the device.
    """
    if dist.get_rank() != 0:
        return
    row_map, rows = layout.row_map, finite_R.tolist()
    for row, finite in enumerate(rows):
        if finite:
            continue
        if row == len(rows) - 1:
            who = "the target's gradient"
        elif dr.row_kind.named:
            who = f"the general gradient of {dr.domains[row]}"
        else:
            context = parallel_state.get_context_parallel_world_size()
            ranks, slot = row_map.members(row, context)
            who = f"the general gradient of data-parallel rank {ranks[0]}, slot {slot},"
        say(f"step {step}: {who} has NaN or Inf")
