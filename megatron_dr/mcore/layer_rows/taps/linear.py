"""Megatron's linear layer with the weight gradient handed to a `weigh` function.

The forward, the input's gradient and their communication are those of Megatron-Core's
`LinearWithGradAccumulationAndAsyncCommunication` (0.19): Y = X W^T, X gathered over the sequence
where that is sharded. The input's gradient and its all-reduce or reduce-scatter start first, so
that scoring, its small collectives and the weight gradient run beside them.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers

from megatron_dr.projection.per_sample import Weighted

# (x [L, N, I], dy [L, N, O]) -> the weight gradient, or None
Weigh = Callable[[torch.Tensor, torch.Tensor], Weighted | None]


class Linear(torch.autograd.Function):
    """X W^T; in the backward the weight's gradient is what `weigh` returns.

    Args:
        input: [s, N, I]; a share of the sequence where `sequence_parallel`.
        weigh: called once in the backward with X [L, N, I], whole, and dY [L, N, O]. None: the
            weight gets no gradient here.
        fused: add the weight gradient to `main_grad` by Megatron's fused kernel.
        allreduce_dgrad, sequence_parallel, tp_group: as Megatron's layers pass them.
    """

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, weigh: Weigh, fused: bool,
        allreduce_dgrad: bool, sequence_parallel: bool, tp_group: dist.ProcessGroup | None,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(input, weight)
        ctx.weigh, ctx.fused, ctx.tp_group = weigh, fused, tp_group
        ctx.allreduce_dgrad, ctx.sequence_parallel = allreduce_dgrad, sequence_parallel
        if sequence_parallel:
            input, wait = _gather(input, tp_group)
            wait()
        return input.matmul(weight.t())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (dy,) = gradients
        input, weight = ctx.saved_tensors
        x, gathered = input, None
        if ctx.sequence_parallel:
            x, gathered = _gather(input, ctx.tp_group)
        dx = dy.matmul(weight)
        if gathered is not None:
            gathered()
        reduced = None
        if ctx.allreduce_dgrad:
            reduced = dist.all_reduce(dx, group=ctx.tp_group, async_op=True)
        elif ctx.sequence_parallel:
            whole, dx = dx.contiguous(), torch.empty_like(input)
            reduced = dist.reduce_scatter_tensor(dx, whole, group=ctx.tp_group, async_op=True)
        weighed = ctx.weigh(x, dy)
        grad_weight = None if weighed is None else _weight_gradient(weight, ctx.fused, weighed)
        if reduced is not None:
            reduced.wait()
        return dx, grad_weight, None, None, None, None, None


def _gather(input: torch.Tensor, group: Any) -> tuple[torch.Tensor, Callable[[], Any]]:
    """The whole sequence from its shares, and a function that waits for it."""
    out = input.new_empty(input.shape[0] * dist.get_world_size(group), *input.shape[1:])
    work = dist.all_gather_into_tensor(out, input.contiguous(), group=group, async_op=True)
    assert work is not None
    return out, work.wait


def _weight_gradient(weight: Any, fused: bool, weighed: Weighted) -> torch.Tensor:
    """[O, I]; with the fused kernel a tensor without content, as Megatron's own."""
    if not fused:
        return weighed.product()
    x_TI, dy_TO = weighed
    kernels = layers.fused_weight_gradient_mlp_cuda
    if not len(x_TI):
        pass  # no sample has a part in it: there is nothing to add
    elif weight.main_grad.dtype == torch.float32:
        kernels.wgrad_gemm_accum_fp32(x_TI, dy_TO, weight.main_grad)
    else:
        kernels.wgrad_gemm_accum_fp16(x_TI, dy_TO, weight.main_grad)
    weight.grad_added_to_main_grad = True
    return torch.empty(weight.main_grad.shape, dtype=x_TI.dtype, device=x_TI.device)
