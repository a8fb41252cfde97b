"""Stand-ins for Transformer Engine's layers, which speak the interface that the taps know.

Its `Linear` and `LayerNormLinear` as far as `te.py` knows them, and `GroupedLinear` as far as
`te_grouped.py` does: a store that delays is given the weight's GEMM, and autograd gets a dummy as
the weight's gradient. They follow TE's sources, 2.20: `pytorch/module/linear.py`,
`layernorm_linear.py` and `grouped_linear.py`; constructed and called as Megatron-Core's subclasses
of them are (`core/extensions/transformer_engine.py`).
"""

import functools
import re
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore.cpu.layers import layer_spec

from . import _megatron
from ._data import Layout
from ._oracle import Parameters
from ._samples import Case


class StockStore:
    def delay_wgrad_compute(self) -> bool:
        return False


class Linear(torch.nn.Module):
    """TE's Linear or, with a norm, its LayerNormLinear; constructed as Megatron's layers are."""

    with_norm, parallel_mode = False, "row"

    def __init__(
        self, inner: int, out: int, *, config: Any, bias: bool, skip_bias_add: bool,
        tp_group: Any = None, is_expert: bool = False, **unused: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        tp = parallel_state.get_tensor_model_parallel_group()
        self.tp_group = parallel_state.get_expert_tensor_parallel_group() if is_expert else tp
        size, column = dist.get_world_size(self.tp_group), self.parallel_mode == "column"
        shape = (out // size, inner) if column else (out, inner // size)
        self.weight = torch.nn.Parameter(torch.zeros(shape))
        self._mark(self.weight, 0 if column else 1, is_expert)
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(shape[0]))
            if column:
                self._mark(self.bias, 0, is_expert)
            else:
                self.bias.sequence_parallel = config.sequence_parallel
        if self.with_norm:
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(inner))
            self.layer_norm_weight.sequence_parallel = config.sequence_parallel
            if config.normalization == "LayerNorm":
                self.layer_norm_bias = torch.nn.Parameter(torch.zeros(inner))
                self.layer_norm_bias.sequence_parallel = config.sequence_parallel
        self.return_bias, self.use_bias = skip_bias_add and bias, bias
        self.tp_size = 1 if is_expert else size  # dispatchers communicate for experts
        self.sequence_parallel = self.tp_size > 1 and config.sequence_parallel
        self.fuse_wgrad_accumulation = config.gradient_accumulation_fusion
        self.zero_centered_gamma = config.layernorm_zero_centered_gamma
        self.gemm_bias_unfused_add = not column and bias and not skip_bias_add
        self.wgrad_store: Any = StockStore()

    def _mark(self, parameter: Any, dim: int, is_expert: bool) -> None:
        parameter.tensor_model_parallel = True
        parameter.partition_dim, parameter.partition_stride = dim, 1
        ep, etp = self.config.expert_model_parallel_size, self.config.expert_tensor_parallel_size
        apart = ep > 1 or etp != self.config.tensor_model_parallel_size
        parameter.allreduce = not (is_expert and apart)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        norm = [getattr(self, f"layer_norm_{name}", None) for name in ("weight", "bias")]
        bias = self.bias if self.use_bias else None
        in_gemm = None if self.return_bias else bias
        y = _Function.apply(x, *norm, self.weight, in_gemm, self, self.wgrad_store)
        return y, bias if self.return_bias else None


class LayerNormLinear(Linear):
    with_norm, parallel_mode = True, "column"


class ColumnLinear(Linear):
    parallel_mode = "column"


Linear.__module__ = "transformer_engine.pytorch.module.linear"
LayerNormLinear.__module__ = "transformer_engine.pytorch.module.layernorm_linear"


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, gamma: Any, beta: Any, weight: Any, bias: Any, module: Any,
                store: Any) -> Any:  # fmt: skip
        ctx.save_for_backward(x, gamma, beta, weight)
        ctx.module, ctx.store, ctx.has_bias = module, store, bias is not None
        out = _Function.norm(x, gamma, beta)
        if module.sequence_parallel and module.parallel_mode == "column":
            out = _gather(out, module.tp_group)
        ctx.out = out
        y = out @ weight.t()
        if module.tp_size > 1 and module.parallel_mode == "row":
            y = _reduce(y, module)
        return y if bias is None else y + bias

    @staticmethod
    def norm(x: Any, gamma: Any, beta: Any) -> Any:
        if gamma is None:
            return x
        x = x if beta is None else x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * gamma
        return x if beta is None else x + beta

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        (x, gamma, beta, weight), module = ctx.saved_tensors, ctx.module
        if module.sequence_parallel and module.parallel_mode == "row":
            dy = _gather(dy, module.tp_group)
        dgrad = dy @ weight
        if module.tp_size > 1 and module.parallel_mode == "column":
            dgrad = _reduce(dgrad, module)
        dy_TO = dy.reshape(-1, dy.shape[-1]).contiguous()
        grad_bias = None

        def wgrad_gemm(x: torch.Tensor, dy: torch.Tensor) -> Any:
            assert x.dim() == dy.dim() == 2 and x.is_contiguous() and dy.is_contiguous()
            weight.main_grad.add_(dy.t() @ x)
            return None, dy.sum(0)

        x_TI = ctx.out.reshape(-1, ctx.out.shape[-1])
        if ctx.store.delay_wgrad_compute():
            ctx.store.put([x_TI, dy_TO], wgrad_gemm)
        else:
            grad_bias = wgrad_gemm(x_TI, dy_TO)[1]
        weight.grad_added_to_main_grad = True
        dummy = torch.full_like(weight, float("nan"))
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, gamma, beta) if t is not None]
            normed = _Function.norm(*leaves, *[None] * (3 - len(leaves)))
            grads = torch.autograd.grad(normed, leaves, dgrad)
        grads = [*grads, *[None] * (3 - len(leaves))]
        return (*grads, dummy, grad_bias if ctx.has_bias else None, None, None)


def _gather(x: torch.Tensor, group: Any) -> torch.Tensor:
    out = x.new_empty(len(x) * dist.get_world_size(group), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _reduce(x: torch.Tensor, module: Any) -> torch.Tensor:
    x = x.contiguous()
    dist.all_reduce(x, group=module.tp_group)
    if not module.sequence_parallel:
        return x
    return x.chunk(module.tp_size)[dist.get_rank(module.tp_group)].contiguous()


def spec(config: Any, **rest: Any) -> Any:
    """Megatron's layers with the stand-ins in the places where its TE layers go."""
    block = layer_spec(config, **rest)
    parts = block.layer_specs[0].submodules
    attention = parts.self_attention.submodules
    parts.input_layernorm = IdentityOp
    attention.linear_qkv, attention.linear_proj = LayerNormLinear, Linear
    if config.num_moe_experts:
        experts = parts.mlp.keywords["submodules"].experts.keywords["submodules"]
        experts.linear_fc1, experts.linear_fc2 = ColumnLinear, Linear
    else:
        parts.pre_mlp_layernorm = IdentityOp
        mlp = parts.mlp.keywords["submodules"]
        mlp.linear_fc1, mlp.linear_fc2 = LayerNormLinear, Linear
    return block


def in_te(parameters: Parameters, layout: Layout) -> Parameters:
    """Norms have the names that they have inside TE's layers."""
    renames = {".input_layernorm.": ".self_attention.linear_qkv.layer_norm_"}
    if not layout.moe:
        renames[".pre_mlp_layernorm."] = ".mlp.linear_fc1.layer_norm_"
    out = {}
    for name, value in parameters.items():
        for old, new in renames.items():
            name = name.replace(old, new)
        out[name] = value
    return out


# -- grouped experts -------------------------------------------------------------------------------
class GroupedLinear(torch.nn.Module):
    """TE's GroupedLinear, without biases; communication is the dispatcher's."""

    parallel_mode = "row"

    def __init__(
        self, num_gemms: int, input_size: int, output_size: int, *, config: Any, init_method: Any,
        bias: bool, skip_bias_add: bool, is_expert: bool, tp_comm_buffer_name: Any = None,
        pg_collection: Any = None, name: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        assert is_expert and not bias
        self.config, self.num_gemms = config, num_gemms
        size, column = dist.get_world_size(pg_collection.expt_tp), self.parallel_mode == "column"
        shape = (output_size // size, input_size) if column else (output_size, input_size // size)
        for number in range(num_gemms):
            weight = torch.nn.Parameter(torch.zeros(shape))
            Linear._mark(self, weight, 0 if column else 1, True)  # type: ignore[arg-type]
            self.register_parameter(f"weight{number}", weight)
        self.fuse_wgrad_accumulation = config.gradient_accumulation_fusion
        self.wgrad_store: Any = StockStore()
        self.is_first_microbatch = True  # Megatron sets it again in each schedule call

    def forward(self, x: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, None]:
        first, self.is_first_microbatch = self.is_first_microbatch, False
        weights = [getattr(self, f"weight{number}") for number in range(self.num_gemms)]
        return _Grouped.apply(x, m_splits, (self.wgrad_store, first), *weights), None


class ColumnGroupedLinear(GroupedLinear):
    parallel_mode = "column"


GroupedLinear.__module__ = "transformer_engine.pytorch.module.grouped_linear"


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, m_splits: Any, non_tensor_args: Any, *weights: Any) -> Any:
        assert sum(m_splits) == len(x)
        ctx.m_splits, (ctx.store, ctx.first) = m_splits, non_tensor_args
        ctx.save_for_backward(x, *weights)
        parts = zip(x.split(m_splits), weights, strict=True)
        return torch.cat([some @ weight.t() for some, weight in parts])

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Any:
        x, *weights = ctx.saved_tensors
        inputmats, dys = list(x.split(ctx.m_splits)), list(grad_output.split(ctx.m_splits))
        dgrad = torch.cat([dy @ weight for dy, weight in zip(dys, weights, strict=True)])

        def grouped_gemm_wgrad(A: Any, B: Any, out: Any) -> Any:
            """`general_grouped_gemm` with layout NT: what is empty is skipped, or zeroed."""
            for a, b, gradient in zip(A, B, out, strict=True):
                assert a.is_contiguous() and b.is_contiguous() and len(a) == len(b)
                if ctx.first:
                    gradient.zero_()
                if a.numel() and b.numel():
                    gradient.add_(b.t() @ a)
            return out, [None] * len(out), None

        main_grads = [weight.main_grad for weight in weights]
        if ctx.store.delay_wgrad_compute():
            ctx.store.put([inputmats, dys, main_grads], grouped_gemm_wgrad)
        else:
            grouped_gemm_wgrad(inputmats, dys, main_grads)
        for weight in weights:
            weight.grad_added_to_main_grad = True
        return dgrad, None, None, *(torch.full_like(w, float("nan")) for w in weights)


def grouped_spec(config: Any, **rest: Any) -> Any:
    """As `spec`, with --moe-grouped-gemm."""
    block = spec(config, **rest)
    layer = block.layer_specs[0].submodules.mlp.keywords["submodules"]
    parts = GroupedMLPSubmodules(linear_fc1=ColumnGroupedLinear, linear_fc2=GroupedLinear)
    layer.experts = functools.partial(TEGroupedMLP, submodules=parts)
    return block


def in_groups(parameters: Parameters, layout: Layout) -> Parameters:
    """Experts' weights have the names that they have in a grouped layer."""
    found = in_te(parameters, layout).items()
    pattern = r"\.local_experts\.(\d+)\.(linear_fc[12]\.weight)"
    return {re.sub(pattern, r".\2\1", name): value for name, value in found}


def refusal(
    layout: Layout, changes: dict[str, Any], frozen: str, of_layers: dict[str, Any] | None = None
) -> str:
    """On a rank: what `attach` says, having left the layers as they were.

    Args:
        changes: of Megatron's configuration; `of_layers`: of its grouped layers.
    """
    _megatron.initialize(layout)
    model, optimizer, config = _megatron.build(layout)
    for name, value in changes.items():
        setattr(config, name, value)
    for name, parameter in model[0].named_parameters():
        if frozen and name.endswith(frozen):
            parameter.requires_grad = False
    for module in model[0].modules():
        if hasattr(module, "num_gemms"):
            vars(module).update(of_layers or {})
    try:
        megatron_dr.attach(model, optimizer, config, DRConfig(rows="sample", **vars(Case())))
    except ValueError as error:
        assert not any("forward" in vars(module) for module in model[0].modules())
        return str(error)
    return ""
