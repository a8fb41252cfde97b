"""What the plugin says: once at attach, and when a gradient is not finite. On rank 0."""

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dr.config import DRConfig
from megatron_dr.mcore.finalize import Projection
from megatron_dr.mcore.grad_rows import GradRows
from megatron_dr.mcore.layout import Layout

# What a set is when M = 1.
_ONE_ROW = {
    "topk": "topk keeps it: standard training",
    "greedy": "greedy keeps it: standard training",
    "filter": "filter keeps it where it agrees with the target, else drops it",
    "capped": "capped gives it weight 1: standard training",
    "hull": "hull gives it weight 1: standard training",
    "cone": "cone keeps its direction where it agrees with the target, else stops it",
    "span": "span keeps its line, with the target's sign",
}


def attached(dr: DRConfig, rows: GradRows, layout: Layout, why: str) -> None:
    """What will be projected, and what it costs."""
    if dist.get_rank() != 0:
        return
    num_rows = layout.row_map.num_rows
    alpha = "" if dr.set == "target" else f"alpha {_alpha(dr)}, "
    _say(
        f"set {dr.set}, {num_rows} rows a step ({dr.rows}), {layout.projected} block(s) "
        f"({dr.blocks}), {alpha}norm {dr.norm}; this rank keeps "
        f"{rows.extra_bytes:,} bytes for slots and, with a target batch, {rows.target_bytes:,} for "
        "the target"
    )
    _say(why)
    if num_rows == 1 and dr.set in _ONE_ROW:
        _say(f"note: one row: {_ONE_ROW[dr.set]}")


def _alpha(dr: DRConfig) -> str:
    if dr.alpha_style in ("linear", "cosine"):
        return f"{dr.alpha} to {dr.end_alpha} ({dr.alpha_style})"
    return str(dr.alpha) if dr.alpha_style == "constant" else "auto"


def not_finite(projection: Projection, layout: Layout, dr: DRConfig, step: int) -> None:
    """Whose gradient has NaN or Inf; what happens to the step is Megatron's decision.

    Reads the device.
    """
    if dist.get_rank() != 0:
        return
    row_map = layout.row_map
    rows = projection.finite_R.tolist()
    for row, finite in enumerate(rows):
        if finite:
            continue
        if row == len(rows) - 1:
            who = "the target's gradient"
        elif row_map.kind == "domain":
            who = f"the general gradient of {dr.domains[row]}"
        else:
            group, slot = divmod(row, row_map.slots)
            ranks = layout.ranks_per_row
            first = (row_map.target_groups + group) * ranks
            first //= parallel_state.get_context_parallel_world_size()
            who = f"the general gradient of data-parallel rank {first}, slot {slot},"
        _say(f"step {step}: {who} has NaN or Inf")


def _say(sentence: str) -> None:
    print(f"megatron_dr: {sentence}", flush=True)
