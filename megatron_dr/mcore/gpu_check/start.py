"""This process as the only rank: NCCL on a GPU, gloo and `cpu.enable()` without."""

import importlib.util
import warnings

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megatron_dr.mcore import cpu


def device() -> torch.device:
    """The GPU that is checked, or the CPU."""
    if cpu.is_enabled() or not torch.cuda.is_available():  # enabled, torch says that there is one
        return torch.device("cpu")
    return torch.device("cuda", 0)


def ready(where: torch.device) -> None:
    """Before anything imports Megatron. Idempotent."""
    warnings.filterwarnings("ignore", module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch renames its collectives
    if where.type == "cuda":
        torch.cuda.set_device(where)
    else:
        cpu.enable()


def start(where: torch.device) -> None:
    """Megatron's process groups, of one rank. Idempotent."""
    ready(where)
    if not dist.is_initialized():
        backend = "nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)


def lacks(layers: str, dtype: str, where: torch.device) -> str:
    """Why this machine can't run such layers, as a state; empty: it can."""
    if layers == "local":
        return ""
    if where.type != "cuda":
        return "skipped: no CUDA device"
    if importlib.util.find_spec("transformer_engine") is None:
        return "skipped: Transformer Engine is not installed"
    if dtype == "fp8" and torch.cuda.get_device_capability(where) < (8, 9):
        return "skipped: this device has no FP8"
    return ""
