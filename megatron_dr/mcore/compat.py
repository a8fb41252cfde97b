"""Every Megatron name the plugin relies on, which versions it was tested with, what it refuses."""

from typing import Any

import torch
from megatron.core import __version__ as megatron_version
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import get_attr_wrapped_model, get_model_config

# what get_forward_backward_func() chooses from, in megatron.core.pipeline_parallel.schedules
SCHEDULES = (
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_without_interleaving",
    "forward_backward_pipelining_with_interleaving",
)

OLDEST, NEWEST = (0, 19), (0, 19)  # minor versions that the tests ran with

# Configuration that no test of ours covers: refused at attach, with what to change.
_UNSUPPORTED_MODEL = {
    "overlap_moe_expert_parallel_comm": "its combined schedule runs two microbatches at once",
    "defer_embedding_wgrad_compute": "it computes weight gradients after the microbatch",
    "delay_wgrad_compute": "it computes weight gradients after the microbatch",
    "hybrid_context_parallel": "its schedule regroups ranks in every microbatch",
    "mtp_num_layers": "multi-token prediction ties the embedding on more than two stages",
    "moe_paged_stash": "it reruns steps",
    "flextron": "its routers are reduced over pipeline stages",
}
_UNSUPPORTED_DDP = {
    "use_megatron_fsdp": "Megatron-FSDP keeps gradients in its own sharded buffers",
    "reuse_grad_buf_for_mxfp8_param_ag": "parameters and gradients share a buffer",
    "param_name_patterns_for_fp32_local_accumulation": "it keeps gradients beside the buffers",
}

_UNSUPPORTED_FLAGS = {
    "use_torch_fsdp2": "torch FSDP2 reduces gradients by itself",
    "rampup_batch_size": "slots need the same number of microbatches in every step",
    "step_batch_size_schedule": "slots need the same number of microbatches in every step",
    "sft": "JSONL with 'prompt' and 'response' goes to --data-path as it is, and --dr-pack packs "
    "both roles' samples",
}
# Sizes that must be 1.
_SINGLE = (
    "num_distributed_optimizer_instances",
    "gtp_weight_remat_size",
    "expert_gtp_weight_remat_size",
)


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The model chunk without DDP and precision wrappers."""
    bare: torch.nn.Module = get_attr_wrapped_model(module, "pre_process", return_model_obj=True)
    return bare


def data_group() -> torch.distributed.ProcessGroup:
    """Ranks that hold the same piece of the model: data x context parallel."""
    group: torch.distributed.ProcessGroup
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group


def model_group() -> torch.distributed.ProcessGroup:
    """Ranks that together hold one copy of the model: tensor x pipeline parallel."""
    group: torch.distributed.ProcessGroup = parallel_state.get_model_parallel_group()
    return group


def check_flags(args: Any) -> None:
    """As `check_contract`, from Megatron's flags alone: before it builds anything."""
    for table in (_UNSUPPORTED_MODEL, _UNSUPPORTED_DDP, _UNSUPPORTED_FLAGS):
        for name, why in table.items():
            if getattr(args, name, None):
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"megatron_dr does not support {flag} ({why}): drop it.")
    _check_single(args)


def _check_single(holder: Any) -> None:
    for name in _SINGLE:
        size = getattr(holder, name, 1) or 1
        if size > 1:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"megatron_dr does not support {flag} {size}: set {flag} 1.")


def check_contract(model: Any, config: Any) -> None:
    """Raise ValueError, in one sentence that says what to change, where the plugin can't work."""
    if not isinstance(model, (list, tuple)) or not model:
        raise ValueError("attach(model, ...) needs Megatron's list of model chunks, e.g. [model].")
    for module in model:
        if not isinstance(module, DistributedDataParallel):
            raise ValueError(
                f"attach needs model chunks wrapped in Megatron-Core's DistributedDataParallel, "
                f"not {type(module).__name__}; Megatron-FSDP and torch FSDP2 are not supported: "
                "drop --use-megatron-fsdp or --use-torch-fsdp2."
            )
    if config is not get_model_config(model[0]):
        raise ValueError(
            "attach(config=...) must be the model's own configuration, "
            "get_model_config(model[0]): a copy's finalize_model_grads_func is never called."
        )
    _check_version()
    ddp = model[0].ddp_config
    for holder, table in ((config, _UNSUPPORTED_MODEL), (ddp, _UNSUPPORTED_DDP)):
        for name, why in table.items():
            if getattr(holder, name, None):
                raise ValueError(f"megatron_dr does not support {name} ({why}): switch it off.")
        _check_single(holder)
    if getattr(config, "cuda_graph_impl", "none") not in (None, "none"):
        raise ValueError("megatron_dr does not support CUDA graphs: drop --cuda-graph-impl.")
    _check_experts()


def _check_version() -> None:
    major, minor = (int(part) for part in megatron_version.split(".")[:2])
    if not OLDEST <= (major, minor) <= NEWEST:
        raise ValueError(
            f"megatron_dr supports megatron-core {'.'.join(map(str, OLDEST))} to "
            f"{'.'.join(map(str, NEWEST))}, but {megatron_version} is installed."
        )


def _check_experts() -> None:
    tp = parallel_state.get_tensor_model_parallel_world_size()
    cp = parallel_state.get_context_parallel_world_size()
    together = expert_ranks()
    if max(together, tp) % min(together, tp) or max(together, tp * cp) % min(together, tp * cp):
        raise ValueError(
            f"expert parallelism over {together} ranks must divide, or be divided by, tensor x "
            f"context parallelism ({tp} x {cp}): ranks that share experts or a sequence form one "
            "row; change --expert-model-parallel-size or --expert-tensor-parallel-size."
        )


def expert_ranks() -> int:
    """Neighbouring ranks of a pipeline stage that exchange tokens."""
    models: int = parallel_state.get_expert_model_parallel_world_size()
    tensors: int = parallel_state.get_expert_tensor_parallel_world_size()
    return models * tensors


def ranks_per_row() -> int:
    """Neighbours in the data group whose gradients belong to one row.

    Context-parallel ranks share sequences; expert-parallel ranks exchange tokens, so an expert's
    gradient mixes theirs. Ranks of a stage are numbered tensor, context, data from the fastest on,
    and expert groups are runs of that numbering.
    """
    tp: int = parallel_state.get_tensor_model_parallel_world_size()
    cp: int = parallel_state.get_context_parallel_world_size()
    return max(cp, expert_ranks() // tp, 1)


def data_ranks_per_row() -> int:
    """Of those, the ranks with microbatches of their own: neighbouring data-parallel ranks."""
    return ranks_per_row() // parallel_state.get_context_parallel_world_size()
