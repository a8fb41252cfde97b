"""The first line of a run's metrics: what the run is."""

import os
import sys
from argparse import Namespace
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from megatron_dr.mcore.attach import Handle
from megatron_dr.report import about

_LAYOUT = {
    "tensor": "tensor_model_parallel_size", "pipeline": "pipeline_model_parallel_size",
    "context": "context_parallel_size", "expert": "expert_model_parallel_size",
    "data": "data_parallel_size",
}  # fmt: skip


def of(args: Namespace, handle: Handle) -> dict[str, Any]:
    """Of a run whose handle is attached; `blocks` only where their values follow."""
    device = handle.rows.device
    found = {
        "steps": args.train_iters,
        "ranks": dist.get_world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "layout": {name: getattr(args, size) for name, size in _LAYOUT.items()},
        "projection": {n: v for n, v in asdict(handle.dr).items() if v not in (None, (), False)},
        "blocks": list(handle.rows.names) if handle.dr.log_blocks else None,
        "record": _absolute(getattr(args, "dr_record", None)),
    }
    return about.of(sys.argv, found)


def _absolute(path: str | None) -> str | None:
    return os.path.abspath(path) if path else None
