"""Transformer Engine's linear layers, behind the one interface through which they give their GEMMs.

A `Linear` or `LayerNormLinear` of TE (2.3 and later; read in 2.20) takes `wgrad_store` at each
forward. Where the store's `delay_wgrad_compute()` is true, the backward calls

    wgrad_store.put([x, dy], wgrad_gemm)

with the exact operands of the weight's gradient, x [T, I] after the norm and dy [T, O], both
gathered over the sequence, in place of `wgrad_gemm(x, dy)`, which adds dy^T x to `main_grad`. Our
store weighs the operands and calls `wgrad_gemm` at once, or not at all. TE's parameters were not
built for delay, so Megatron's data parallelism works as without.

| parameter | gradient |
|---|---|
| weight | `wgrad_gemm` of the weighted operands |
| bias, in the GEMM or returned to be added later | TE gives none to a delayed GEMM; ours is an edge on the output, whose gradient is the bias's, sample by sample |
| norm weight gamma, norm bias beta (`LayerNormLinear`) | the norm's output gradient q = dy W is not visible outside, so it is computed again (a third GEMM of the backward's size): dgamma_n = sum over l of q (x - beta) / gamma, dbeta_n = sum over l of q, summed over tensor-parallel ranks |

An element of gamma that is exactly 0 gets no gradient. TE's own norms (`TENorm`) are tapped as
any norm, by their name; grouped linears by `te_grouped.py`. TE's fused operations and LayerNormMLP,
which no layer of Megatron-Core is made of, are covered by no tap: `attach` names them. FP8 and FP4,
userbuffers and a layer of split weights are refused.

No GPU and no TE has run this: the mathematics was tested through a stand-in that speaks this
interface, and the names against TE's sources.
"""  # noqa: E501

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_dr.mcore.layer_rows.path import SamplePath
from megatron_dr.mcore.layer_rows.taps import experts
from megatron_dr.mcore.layer_rows.taps.hooks import Undo, Written, put, trained

_LAYERS = ("Linear", "LayerNormLinear")


def is_linear(module: torch.nn.Module) -> bool:
    """Whether it is one of TE's linear layers, or Megatron's subclass of one."""
    return any(
        kind.__name__ in _LAYERS and kind.__module__.startswith("transformer_engine.pytorch.module")
        for kind in type(module).__mro__
    )


class Store:
    """What stands in for TE's `WeightGradStore` in one forward and its backward.

    Args:
        weigh: (x [T, I], dy [T, O]) -> the operands of the weight's gradient, or None for no
            gradient now.
    """

    def __init__(self, weigh: Callable[..., Any]) -> None:
        self._weigh = weigh

    def delay_wgrad_compute(self) -> bool:
        return True

    def put(self, tensors: list[torch.Tensor], wgrad_gemm: Callable[..., Any]) -> None:
        """The layer's backward hands over its operands and its GEMM."""
        operands = self._weigh(*tensors)
        if operands is not None and len(operands[0]):
            wgrad_gemm(*operands)


def tap(module: Any, observer: SamplePath, routes: experts.Routes) -> list[Undo]:
    """Tap one of TE's linear layers.

    Raises:
        ValueError: settings under which TE's layers don't hand over what is needed.
    """
    own = trained(module, observer)
    if not own:
        return []
    _check(module, own)
    stock_forward, stock_store = module.forward, module.wgrad_store
    norm = {n: p for n, p in own.items() if n.startswith("layer_norm_")}
    gradients = Written(norm.values())

    def forward(inp: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not observer.active or not torch.is_grad_enabled():
            return stock_forward(inp, *args, **kwargs)
        (index_LN,) = routes.get(module, [None])
        by_sample = functools.partial(_by_sample, index_LN, inp.shape)
        weigh = functools.partial(_weigh, module, observer, norm, gradients, by_sample)
        module.wgrad_store = Store(weigh)
        try:
            out = stock_forward(inp, *args, **kwargs)
        finally:
            module.wgrad_store = stock_store
        return _with_bias(out, own["bias"], observer) if "bias" in own else out

    return [put(module, "forward", forward), *gradients.undo]


def check_operands(module: Any) -> None:
    """Raise ValueError where operands are not what they were, or gradients not added in place."""
    config = module.config
    if config.fp8 or config.fp4 or getattr(config, "quant_recipe", None):
        raise ValueError(
            "sample rows need the operands of Transformer Engine's layers as they are, not "
            "quantised: drop --fp8-format and --fp4-format, or use --dr-rows slot."
        )
    if not module.fuse_wgrad_accumulation:
        raise ValueError(
            "Transformer Engine's layers return no gradient of a weighted GEMM: drop "
            "--no-gradient-accumulation-fusion, so that they add it to main_grad."
        )


def _check(module: Any, own: dict[str, torch.nn.Parameter]) -> None:
    config = module.config
    if not own.keys() <= {"weight", "bias", "layer_norm_weight", "layer_norm_bias"}:
        raise ValueError(
            f"sample rows can't observe {', '.join(own)} of one Transformer Engine layer: build it "
            "without parameters_split, or use --dr-rows slot."
        )
    if "weight" in own:
        check_operands(module)
    if config.tp_comm_overlap:
        raise ValueError(
            "Transformer Engine hands over no operands of GEMMs that overlap communication: drop "
            "--tp-comm-overlap, or use --dr-rows slot."
        )
    if "weight" not in own and any(name.startswith("layer_norm_") for name in own):
        raise ValueError(
            "a norm inside Transformer Engine's LayerNormLinear is observed through its weight, "
            "which is frozen here: freeze the norm too, or use --dr-rows slot."
        )
    if "bias" in own and getattr(module, "gemm_bias_unfused_add", False):
        raise ValueError(
            "sample rows can't observe a bias that Transformer Engine adds after a row-parallel "
            "layer's reduction: build the layer with skip_bias_add, or use --disable-bias-linear."
        )


def _by_sample(
    index_LN: torch.Tensor | None, shape: torch.Size, rows: torch.Tensor
) -> torch.Tensor:
    """Tokens [T, .] as [L, N, .].

    Args:
        index_LN: in experts: which tokens are whose.
        shape: of the layer's input [s, N, I]; tokens of a sequence lie N apart.
    """
    if index_LN is not None:
        return experts.rows(rows, index_LN)
    return rows.view(-1, shape[1], rows.shape[-1])


def _weigh(
    module: Any, observer: SamplePath, norm: dict[str, torch.nn.Parameter],
    gradients: Written, by_sample: Callable[[torch.Tensor], torch.Tensor],
    x_TI: torch.Tensor, dy_TO: torch.Tensor,
) -> Any:  # fmt: skip
    x_LNI, dy_LNO = by_sample(x_TI), by_sample(dy_TO)
    if norm:
        q_LNI = (dy_LNO @ module.weight).float()
        for name, parameter in norm.items():
            per_token = q_LNI * _normalised(module, x_LNI) if name.endswith("weight") else q_LNI
            g_NI = observer.per_sample(parameter, per_token)
            if module.tp_size > 1 and not module.sequence_parallel:  # else Megatron sums the parts
                dist.all_reduce(g_NI, group=module.tp_group)
            gradients.put(parameter, observer.vector(parameter, g_NI))
    return observer.linear(module.weight, x_LNI, dy_LNO)


def _normalised(module: Any, x_LNI: torch.Tensor) -> torch.Tensor:
    """The norm's output before its weight and bias, from the one after, in fp32."""
    gamma_I, x_LNI = module.layer_norm_weight.detach().float(), x_LNI.float()
    if module.zero_centered_gamma:
        gamma_I = gamma_I + 1.0
    if getattr(module, "layer_norm_bias", None) is not None:
        x_LNI = x_LNI - module.layer_norm_bias.detach().float()
    return torch.where(gamma_I == 0, 0.0, x_LNI / gamma_I)


def _with_bias(out: Any, bias: torch.nn.Parameter, observer: SamplePath) -> Any:
    """The layer's outputs (y, bias to be added later or None), with the bias's edge on y."""
    y, later = out
    y = _Bias.apply(y, bias, observer)
    return y, None if later is None else later.detach()


class _Bias(torch.autograd.Function):
    """y as it is; its gradient is that of a bias [O] that was, or will be, added to y [s, N, O]."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, bias: torch.nn.Parameter, observer: SamplePath
    ) -> torch.Tensor:
        ctx.bias, ctx.observer = bias, observer
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (dy,) = gradients
        g_NO = ctx.observer.per_sample(ctx.bias, dy.float())
        grad = ctx.observer.vector(ctx.bias, g_NO)
        grad = torch.zeros_like(ctx.bias) if grad is None else grad.to(ctx.bias.dtype)
        return dy, grad, None
