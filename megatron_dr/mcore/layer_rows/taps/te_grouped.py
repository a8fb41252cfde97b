"""Transformer Engine's GroupedLinear: a linear layer of all of a rank's experts, as one module.

Megatron-Core has it for experts with `--moe-grouped-gemm`. Its weights are weight0 .. weight(E-1);
its input is the dispatched tokens, sorted by expert. As `te.py` says of the other layers, where its
store's `delay_wgrad_compute()` is true, its backward calls (TE 2.3 to 2.20,
`pytorch/module/grouped_linear.py`)

    wgrad_store.put([inputs, output_gradients, main_grads], grouped_gemm)

with a list of an expert's operands each, x [T, I] and dy [T, O]. They are weighed expert by expert
by the index of tokens that `experts.py` has, then go into the one grouped GEMM. An expert that gets
no gradient now has operands without tokens, which the GEMM skips.

`tests/mcore/test_te_grouped.py` has run this through a stand-in for TE's layer, on the CPU; no GPU
and no TE has.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch

from megatron_dr.mcore.layer_rows.path import SamplePath
from megatron_dr.mcore.layer_rows.taps import experts, te
from megatron_dr.mcore.layer_rows.taps.hooks import Undo, put, trained

_FUSED = "NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM"


def is_grouped(module: torch.nn.Module) -> bool:
    """Whether it is TE's grouped linear layer, or Megatron's subclass of it."""
    return any(
        kind.__name__ == "GroupedLinear"
        and kind.__module__.startswith("transformer_engine.pytorch.module")
        for kind in type(module).__mro__
    )


def tap(module: Any, observer: SamplePath, routes: experts.Routes) -> list[Undo]:
    """Tap one of TE's grouped linear layers. Biases are left to be refused, as of any expert.

    Raises:
        ValueError: settings under which it doesn't hand over what is needed.
    """
    if not any(name.startswith("weight") for name in trained(module, observer)):
        return []
    _check(module, observer)
    weights = [getattr(module, f"weight{number}") for number in range(module.num_gemms)]
    stock_forward, stock_store = module.forward, module.wgrad_store

    def forward(inp: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not observer.active or not torch.is_grad_enabled():
            return stock_forward(inp, *args, **kwargs)
        module.wgrad_store = te.Store(functools.partial(_weigh, observer, weights, routes[module]))
        try:
            return stock_forward(inp, *args, **kwargs)
        finally:
            module.wgrad_store = stock_store

    return [put(module, "forward", forward)]


def _check(module: Any, observer: SamplePath) -> None:
    if getattr(module, "single_grouped_weight", False) or not hasattr(module, "weight0"):
        raise ValueError(
            "sample rows can't observe experts that share one parameter: drop "
            "--moe-single-grouped-weight, or use --dr-rows slot."
        )
    numbered = [getattr(module, f"weight{number}") for number in range(module.num_gemms)]
    if not all(map(observer.covers, numbered)):
        raise ValueError(
            "Transformer Engine's grouped layer gives gradients to all of its experts or to none, "
            "and some are frozen here: freeze all of a layer's, or none, or drop "
            "--moe-grouped-gemm."
        )
    te.check_operands(module)
    if getattr(module.config, "use_transformer_engine_op_fuser", False):
        raise ValueError(
            "sample rows can't observe experts inside Transformer Engine's fused operations: drop "
            "--use-transformer-engine-op-fuser, or use --dr-rows slot."
        )
    if getattr(module, "use_grouped_tensor", os.getenv(_FUSED, "0") not in ("", "0")):
        raise ValueError(
            f"sample rows need each expert's operands, not Transformer Engine's grouped tensors: "
            f"unset {_FUSED}, or use --dr-rows slot."
        )


def _weigh(
    observer: SamplePath, weights: Sequence[torch.nn.Parameter], indices: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], main_grads: Any,
) -> tuple[list[torch.Tensor], list[torch.Tensor], Any] | None:  # fmt: skip
    """The grouped GEMM's operands; None: no expert has a gradient now."""
    xs, dys = [], []
    for weight, index_LN, x_TI, dy_TO in zip(weights, indices, inputs, gradients, strict=True):
        x_LNI, dy_LNO = experts.rows(x_TI, index_LN), experts.rows(dy_TO, index_LN)
        weighed = observer.linear(weight, x_LNI, dy_LNO)
        x, dy = (x_TI[:0], dy_TO[:0]) if weighed is None else weighed
        xs.append(x)
        dys.append(dy)
    return (xs, dys, main_grads) if any(map(len, xs)) else None
