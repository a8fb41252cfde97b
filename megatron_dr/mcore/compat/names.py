"""Every name of Megatron's model, buffers and ranks that the plugin relies on."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from megatron.core import num_microbatches_calculator, parallel_state
from megatron.core.utils import get_attr_wrapped_model
from torch.distributed import ProcessGroup

# what get_forward_backward_func() chooses from, in megatron.core.pipeline_parallel.schedules
SCHEDULES = (
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_without_interleaving",
    "forward_backward_pipelining_with_interleaving",
)


class GradBuffer(Protocol):
    grad_data: torch.Tensor
    param_index_map: dict[torch.nn.Parameter, tuple[int, int, int]]


class Bucket(Protocol):
    grad_data: torch.Tensor
    params_list: list[torch.nn.Parameter]
    offset: int
    gradient_scaling_factor: float


class BucketGroup(Protocol):
    buckets: list[Bucket]
    ddp_config: Any
    is_first_batch: bool
    is_last_microbatch: bool
    param_gather_dispatched: bool
    grad_reduce_finished: bool
    data_parallel_group: ProcessGroup
    intra_distributed_optimizer_instance_group: ProcessGroup
    inter_distributed_optimizer_instance_group: ProcessGroup
    per_param_grad_ready_counts: dict[torch.nn.Parameter, int]
    golden_per_param_grad_ready_counts: dict[torch.nn.Parameter, int]
    start_grad_sync: Any  # these two are replaced for the time of a step
    finish_grad_sync: Any
    check_grads: Callable[..., None]


class Chunk(Protocol):  # in Megatron's DDP
    ddp_config: Any
    buffers: list[GradBuffer]
    expert_parallel_buffers: list[GradBuffer]
    bucket_groups: list[BucketGroup]
    expert_parallel_bucket_groups: list[BucketGroup]

    def zero_grad_buffer(self) -> None: ...
    def offload_grad_buffers(self) -> None: ...


Schedule = Callable[..., list[dict[str, torch.Tensor]]]  # what get_forward_backward_func() returns


def grad_buffers(model: Sequence[Chunk]) -> list[GradBuffer]:
    """Of all chunks, dense ones first."""
    dense = [buffer for chunk in model for buffer in chunk.buffers]
    return dense + [buffer for chunk in model for buffer in chunk.expert_parallel_buffers]


def bucket_groups(model: Sequence[Chunk]) -> Iterator[BucketGroup]:
    for chunk in model:
        yield from chunk.bucket_groups
        yield from chunk.expert_parallel_bucket_groups


class Peers(NamedTuple):
    """The ranks over which a bucket group is reduced.

    Attributes:
        all: the D ranks, data x context parallel, or expert data parallel.
        instance: of them, neighbours that have a shard of the optimizer's each: all D, but with
            several instances of the distributed optimizer.
        copies: the ranks with the same shard, one of each instance; None of one instance.
    """

    all: ProcessGroup
    instance: ProcessGroup
    copies: ProcessGroup | None


def peers(group: BucketGroup) -> Peers:
    if not group.ddp_config.use_distributed_optimizer:
        return Peers(group.data_parallel_group, group.data_parallel_group, None)
    instance = group.intra_distributed_optimizer_instance_group
    if group.ddp_config.num_distributed_optimizer_instances == 1:
        return Peers(instance, instance, None)
    dense = getattr(group.buckets[0].params_list[0], "allreduce", True)
    whole = data_group() if dense else parallel_state.get_expert_data_parallel_group()
    return Peers(whole, instance, group.inter_distributed_optimizer_instance_group)


def num_microbatches() -> int | None:
    """Of a rank and step, as Megatron's calculator has it; None where none was set up, 1 where it
    changes in the run: what divides every number."""
    calculator = num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR
    if calculator is None:
        return None
    constant = isinstance(calculator, num_microbatches_calculator.ConstantNumMicroBatchesCalculator)
    return int(calculator.get()) if constant else 1


def samples_of_a_step() -> tuple[int, int] | None:
    """General samples of a microbatch, and of a step over all ranks, where its size changes the
    fewest; None where no calculator was set up."""
    number = num_microbatches()
    if number is None:
        return None
    micro = int(num_microbatches_calculator.get_micro_batch_size())
    return micro, micro * number * parallel_state.get_data_parallel_world_size()


def samples_before(steps: int) -> list[int]:
    """General samples of a run before each of its steps, as Megatron's calculator counts them."""
    calculator = copy.copy(num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR)
    assert calculator is not None
    taken = [0]
    for _ in range(steps - 1):
        calculator.update(taken[-1], False)
        taken.append(taken[-1] + int(calculator.get_current_running_global_batch_size()))
    return taken[:steps]


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The model chunk without DDP and precision wrappers."""
    bare: torch.nn.Module = get_attr_wrapped_model(module, "pre_process", return_model_obj=True)
    return bare


def device() -> torch.device:
    """This rank's, whether or not it has parameters to train."""
    return torch.device(torch.cuda.current_device())


def data_group() -> ProcessGroup:
    """Ranks that hold the same piece of the model: data x context parallel."""
    group: ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group


def instance_ranks() -> int:
    """Of the data group, in an instance of the distributed optimizer; all but with several."""
    part = parallel_state.get_data_parallel_group(
        with_context_parallel=True, partial_data_parallel=True
    )
    return int(part.size())


def model_group() -> ProcessGroup:
    """Ranks that together hold one copy of the model: tensor x pipeline parallel."""
    group: ProcessGroup = parallel_state.get_model_parallel_group()
    return group


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
    return int(ranks_per_row() // parallel_state.get_context_parallel_world_size())
