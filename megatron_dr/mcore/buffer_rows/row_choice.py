"""`--dr-rows auto`: rows of ranks where there are enough of them, else slots as memory allows.

A row of ranks costs a shard of the target and no wire of its own. Each slot beyond the first keeps
a gradient buffer and sends it once more, so slots are taken only where ranks alone make fewer than
8 rows, and only as many as fit. With adapters the buffers are small, and slots are free.
"""

import dataclasses
import functools
import os

import torch
import torch.distributed as dist

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore import compat
from megatron_dr.mcore.buffer_rows.row_groups import ranks_per_row
from megatron_dr.plan.choice import choose


def settled(dr: DRConfig, model: list[compat.Chunk]) -> tuple[DRConfig, str]:
    """The configuration with the rows that this run has, and a sentence that says why (collective).

    The same on every rank: the one with the least memory decides.
    """
    if not dr.row_kind.at_attach:
        return dr, ""
    together = ranks_per_row(dr)
    groups = dist.get_world_size(compat.data_group()) // together
    buffers = compat.grad_buffers(model)
    each = sum(b.grad_data.numel() for b in buffers) * (2 if dr.slot_dtype == "bf16" else 4)
    target = sum(b.grad_data.nbytes for b in buffers)
    target *= dr.target_sets if dr.targets == "maximin" else 1
    device = compat.device()  # a stage may have no gradients at all
    fit = torch.tensor((dr.memory * free_bytes(device) - target) // max(each, 1), device=device)
    dist.all_reduce(fit, op=dist.ReduceOp.MIN)
    slots, why = choose(groups, compat.num_microbatches(), 1 + max(0, int(fit)))
    ranks = f"{groups} rows of {together} rank{'s'[: together > 1]}"
    settle = functools.partial(dataclasses.replace, dr, row_ranks=together)
    if slots == 1 or not dr.weighs_rows:
        return settle(rows="rank", slots=None), f"rows auto: {ranks} ({why})"
    more = f"{slots} slots on each, {(slots - 1) * each:,} bytes"
    return settle(rows="slot", slots=slots), f"rows auto: {ranks}, {more} ({why})"


def free_bytes(device: torch.device) -> float:
    """Of this rank's device now; on the CPU its share of the machine's."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages / int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
