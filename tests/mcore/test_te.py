"""Sample rows in Transformer Engine's layers, through a stand-in that speaks their interface.

The stand-ins are TE's `Linear` and `LayerNormLinear` as far as `te.py` knows them: a store that
delays is given the weight's GEMM, and autograd gets a dummy as the weight's gradient.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.identity_op import IdentityOp

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore.cpu.layers import layer_spec

from . import _megatron, _oracle, _samples
from ._data import Layout
from ._oracle import Parameters
from ._pairs import pairs
from ._ranks import run_ranks
from ._sample_check import MODES, STEPS, compare, expected
from ._samples import Case


# -- the stand-ins ---------------------------------------------------------------------------------
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


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_megatron, "layer_spec", spec)


# -- tests -----------------------------------------------------------------------------------------
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


LAYOUTS = {
    "one": Layout(fused_gradients=True, per_token=True),
    "biases": Layout(fused_gradients=True, layer_norm=True),
    "TP 2": Layout(fused_gradients=True, tp=2, per_token=True),
    "biases TP 2": Layout(fused_gradients=True, tp=2, layer_norm=True, per_token=True),
    "biases TP 2 SP": Layout(fused_gradients=True, tp=2, layer_norm=True, sequence_parallel=True),
    "recompute TP 2 SP": Layout(
        fused_gradients=True, tp=2, sequence_parallel=True, recompute=True, per_token=True
    ),
    "PP 2": Layout(fused_gradients=True, pp=2),
    "DP 2 overlap biases": Layout(
        fused_gradients=True, dp=2, overlap=True, distributed_optimizer=True, layer_norm=True
    ),
    "experts TP 2 SP": Layout(
        fused_gradients=True, tp=2, etp=2, sequence_parallel=True, moe=True, per_token=True
    ),
}


@pairs(LAYOUTS, ("cone ghost", "model two passes"))
def test_equals_oracle(first: str, second: str) -> None:
    where, case = LAYOUTS[first], MODES[second]
    initial = in_te(_oracle.initial(where), where)
    ranks = run_ranks(where.world, _samples.train, where, case, STEPS, initial)
    parameters, log = expected(replace(where.alone, dp=where.dp), case)
    compare(ranks, in_te(parameters, where), log, case)


def refusal(layout: Layout, changes: dict[str, Any], frozen: str) -> str:
    """On a rank: what `attach` says, having left the layers as they were."""
    _megatron.initialize(layout)
    model, optimizer, config = _megatron.build(layout)
    for name, value in changes.items():
        setattr(config, name, value)
    for name, parameter in model[0].named_parameters():
        if frozen and name.endswith(frozen):
            parameter.requires_grad = False
    try:
        megatron_dr.attach(model, optimizer, config, DRConfig(rows="sample", **vars(Case())))
    except ValueError as error:
        assert not any("forward" in vars(module) for module in model[0].modules())
        return str(error)
    return ""


FUSED = Layout(fused_gradients=True)


@pytest.mark.parametrize(
    ("layout", "changes", "frozen", "message"),
    [
        (FUSED, {"fp8": "hybrid"}, "", "drop --fp8-format"),
        (FUSED, {"tp_comm_overlap": True}, "", "drop --tp-comm-overlap"),
        (Layout(), {}, "", "drop --no-gradient-accumulation-fusion"),
        (FUSED, {}, "linear_qkv.weight", "freeze the norm too"),
    ],
)
def test_refused(layout: Layout, changes: dict[str, Any], frozen: str, message: str) -> None:
    (said,) = run_ranks(1, refusal, layout, changes, frozen)
    assert message in said


# What `te.py` relies on, in the words of TE's sources.
CONTRACT = {
    "module/linear.py": (
        "wgrad_store = self.wgrad_store if self.wgrad_store.delay_wgrad_compute() else None",
        ".wgrad_store.put([inputmat_total, grad_output], wgrad_gemm)",
        "class Linear(TransformerEngineBaseModule)",
        "self.fuse_wgrad_accumulation = fuse_wgrad_accumulation",
        "self.gemm_bias_unfused_add = True",
        "grad_added_to_main_grad = True",
    ),
    "module/layernorm_linear.py": (
        "ctx.wgrad_store is not None and ctx.wgrad_store.delay_wgrad_compute()",
        "ctx.wgrad_store.put([ln_out_total, grad_output], wgrad_gemm)",
        "class LayerNormLinear(TransformerEngineBaseModule)",
        "self.zero_centered_gamma = zero_centered_gamma",
        '"layer_norm_weight"',
        '"layer_norm_bias"',
        "grad_added_to_main_grad = True",
    ),
    "module/base.py": ("grad_output = grad_output.reshape((-1, grad_output.shape[-1]))",),
}


@pytest.mark.parametrize("file", CONTRACT)
def test_sources_of_transformer_engine(file: str) -> None:
    found = importlib.util.find_spec("transformer_engine")
    if found is None or not found.submodule_search_locations:
        pytest.skip("Transformer Engine is not installed")
    text = (Path(found.submodule_search_locations[0]) / "pytorch" / file).read_text()
    for words in CONTRACT[file]:
        assert words in text, f"{file} has changed: {words}"
