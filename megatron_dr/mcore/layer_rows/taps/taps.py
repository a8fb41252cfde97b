"""Where a model's layers tell what their backward has at hand, and what gradient they get.

| parameter | observed | gradient written by |
|---|---|---|
| weights of linear layers | X, dY in their own backward (`linear.py`) | that backward |
| their biases | a copy per sample: autograd sums over tokens alone | the copying |
| norms' weights and biases | input and the output's gradient | a hook on the parameter |
| embeddings | token ids and the output's gradient | a hook on the parameter |
| routers of experts | input and the logits' gradient | a hook on the parameter |

With activation recompute the forward runs twice; only the one that builds a graph is observed.
Tokens in experts are traced back to their samples by `experts.py`; Transformer Engine's layers are
tapped by `te.py` and `te_grouped.py`.
"""

import functools
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import Router

from megatron_dr.mcore.layer_rows.path import SamplePath
from megatron_dr.mcore.layer_rows.taps import experts, te, te_grouped
from megatron_dr.mcore.layer_rows.taps.hooks import Undo, Written, put, trained, watch
from megatron_dr.mcore.layer_rows.taps.linear import Linear


def install(chunks: Iterable[torch.nn.Module], observer: SamplePath) -> ExitStack:
    """Tap every layer of a model's chunks; returns what takes the taps off.

    Raises:
        ValueError: a trained parameter that no tap covers, naming it.
    """
    with ExitStack() as undo:
        for chunk in chunks:
            _install(chunk, observer, undo)
        return undo.pop_all()


def _install(chunk: torch.nn.Module, observer: SamplePath, undo: ExitStack) -> None:
    covered: set[int] = set()
    table = _taps({})
    for path, module in chunk.named_modules():
        tap = next((tap for kind, tap in table if kind(module)), None)
        if tap is not None:
            for step in tap(module, observer):
                undo.callback(step)
            covered |= {
                id(p)
                for name, p in module.named_parameters(recurse=False)
                if not (name.startswith("bias") and ".experts." in path)
            }
    for name, parameter in chunk.named_parameters():
        if observer.covers(parameter) and id(parameter) not in covered:
            raise ValueError(
                f"sample rows can't observe {name}: it is in none of Megatron's linear, norm, "
                "router and embedding layers, or an expert's bias; freeze it, or use --dr-rows "
                "slot."
            )


def _taps(routes: experts.Routes) -> list[tuple[Callable[[Any], bool], Callable[..., list[Undo]]]]:
    def norm(module: Any) -> bool:
        return type(module).__name__.endswith(("Norm", "LayerNorm"))

    linears = (ColumnParallelLinear, RowParallelLinear)
    return [
        (lambda m: isinstance(m, linears), functools.partial(_tap_linear, routes=routes)),
        (te.is_linear, functools.partial(te.tap, routes=routes)),
        (te_grouped.is_grouped, functools.partial(te_grouped.tap, routes=routes)),
        (lambda m: isinstance(m, Router), experts.tap_router),
        (
            lambda m: isinstance(m, MoELayer),
            functools.partial(experts.tap_dispatcher, routes=routes),
        ),
        (lambda m: isinstance(m, (VocabParallelEmbedding, torch.nn.Embedding)), _tap_embedding),
        (norm, _tap_norm),
    ]


def _tap_linear(module: Any, observer: SamplePath, routes: experts.Routes) -> list[Undo]:
    stock_impl, stock_forward, bias = module._forward_impl, module.forward, module.bias

    def forward_impl(
        input: torch.Tensor, weight: torch.nn.Parameter, bias: torch.Tensor | None, **how: Any
    ) -> Any:
        if not observer.active or not torch.is_grad_enabled() or not observer.covers(weight):
            return stock_impl(input=input, weight=weight, bias=bias, **how)
        weigh: Callable[..., Any] = functools.partial(observer.linear, weight)
        if module in routes:
            weigh = experts.by_sample(weigh, routes[module][0])
        output: torch.Tensor = Linear.apply(
            input, weight, weigh, how["gradient_accumulation_fusion"], how["allreduce_dgrad"],
            how["sequence_parallel"], how["tp_group"],
        )  # fmt: skip
        return output if bias is None else output + bias

    def forward(input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not observer.active:
            return stock_forward(input_, *args, **kwargs)
        # in the module's own dictionary it hides the parameter
        tokens = _output_tokens(module, input_) if observer.packed else 1
        shape = (tokens, input_.shape[1])
        module.__dict__["bias"] = _Expand.apply(bias, shape, observer)
        try:
            return stock_forward(input_, *args, **kwargs)
        finally:
            del module.__dict__["bias"]

    undo = [put(module, "_forward_impl", forward_impl)]
    if bias is not None and observer.covers(bias):
        undo.append(put(module, "forward", forward))
    return undo


def _output_tokens(module: Any, input_: torch.Tensor) -> int:
    """Length of the sequence that leaves a linear layer on this rank."""
    length, shares = input_.shape[0], dist.get_world_size(module.tp_group)
    if not module.sequence_parallel:
        return length
    return length * shares if isinstance(module, ColumnParallelLinear) else length // shares


class _Expand(torch.autograd.Function):
    """A bias [H] as [1, N, H]: what autograd sums for it is each sample's own gradient. In a pack
    as [T, 1, H], of each token."""

    @staticmethod
    def forward(
        ctx: Any, bias: torch.nn.Parameter, shape: tuple[int, int], observer: Any
    ) -> torch.Tensor:
        ctx.bias, ctx.observer = bias, observer
        return bias.view(1, 1, -1).expand(*shape, -1).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        g_NH = ctx.observer.per_sample(ctx.bias, gradients[0].float())
        grad = ctx.observer.vector(ctx.bias, g_NH)
        grad = torch.zeros_like(ctx.bias) if grad is None else grad.to(ctx.bias.dtype)
        return grad, None, None


def _tap_norm(module: Any, observer: SamplePath) -> list[Undo]:
    own = trained(module, observer)
    if not own:
        return []
    gradients = Written(own.values())

    def observe(x: torch.Tensor, dy: torch.Tensor) -> None:
        for name, parameter in own.items():
            per_token = dy.float() * _normalised(module, x) if name == "weight" else dy.float()
            grad = observer.vector(parameter, observer.per_sample(parameter, per_token))
            gradients.put(parameter, grad)

    return [watch(module, "forward", observer, observe), *gradients.undo]


def _normalised(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The norm's output before its weight and bias, in fp32."""
    x, eps = x.float(), getattr(module, "eps", None)
    if eps is None:
        eps = torch.finfo(torch.float32).eps
    if "RMS" not in type(module).__name__ and getattr(module, "normalization", "") != "RMSNorm":
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _tap_embedding(module: Any, observer: SamplePath) -> list[Undo]:
    weight = module.weight
    if not observer.covers(weight):
        return []
    gradients = Written([weight])

    def observe(ids: torch.Tensor, dy: torch.Tensor) -> None:
        if getattr(module, "reduce_scatter_embeddings", False):
            dy = gather_from_sequence_parallel_region(dy, group=module.tp_group)
        else:
            dy = dy.transpose(0, 1)  # [N, L, H] -> [L, N, H]
        gradients.put(weight, observer.embedding(weight, dy, _rows(module, ids).t()))

    return [watch(module, "forward", observer, observe), *gradients.undo]


def _rows(module: Any, ids: torch.Tensor) -> torch.Tensor:
    """Row of this rank's weight that a token uses; -1 where another rank has it."""
    first = getattr(module, "vocab_start_index", 0)
    last = getattr(module, "vocab_end_index", module.weight.shape[0])
    return torch.where((ids >= first) & (ids < last), ids - first, -1)
