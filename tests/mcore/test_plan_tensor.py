"""The plan's tensor-parallel collectives are as many and as large as those of real runs."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dr.plan import tensor
from megatron_dr.plan.activations import Kept, Recompute, Shape
from megatron_dr.plan.buffers import stages
from megatron_dr.plan.hardware import H100, Link

from . import _counted, _data, _megatron, _saved
from ._data import LENGTH, Layout
from ._ranks import run_ranks

FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
SP = dict(sequence_parallel=True)
CASES: dict[str, tuple[Layout, Recompute, dict[str, Any]]] = {
    "tp2": (Layout(tp=2), Recompute(), {}),
    "tp2, sequences split": (Layout(tp=2, **SP), Recompute(), {}),
    "tp2, LayerNorm, split, full recompute": (
        Layout(tp=2, layer_norm=True, **SP), Recompute("full"), FULL),
    "tp2 pp2, split": (Layout(tp=2, pp=2, **SP), Recompute(), {}),
    "tp2, experts": (Layout(tp=2, moe=True, **SP), Recompute(), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_collectives(name: str) -> None:
    """Their number is what a latency of a second makes of it, their bytes what a byte a second."""
    layout, recompute, options = CASES[name]
    model, own, _ = _counted.planned(layout, None)
    kept = Kept(Shape(1, LENGTH), recompute)
    ranks = run_ranks(layout.world, _of_rank, layout, options)
    for stage in stages(model, own):
        of_it = {(messages, sent) for number, messages, sent in ranks if number == stage.number}
        assert len(of_it) == 1
        messages, sent = of_it.pop()
        for link, found in ((Link(1e30, 1.0), messages), (Link(1.0, 0.0), sent)):
            slow = replace(H100, inside=link, overlaps=False)
            assert tensor.seconds(stage, kept, slow) == pytest.approx(found), stage.number


def test_beside_products() -> None:
    """What a backward hides is not more than the products beside it take."""
    layout = Layout(tp=2, **SP)
    model, own, _ = _counted.planned(layout, None)
    (stage,), kept = stages(model, own), Kept(Shape(1, LENGTH))
    found = [tensor.seconds(stage, kept, replace(H100, flops=flops)) for flops in (1e30, 1e12, 1e6)]
    whole = tensor.seconds(stage, kept, replace(H100, overlaps=False))
    assert found[0] == pytest.approx(whole) and found[0] > found[1] > found[2]
    # of 10 of a layer 6 are left, of the output layer's 3 one
    with_latency = replace(H100, inside=Link(1e30, 1.0), flops=1e-30)
    assert tensor.seconds(stage, kept, with_latency) == pytest.approx(6 * model.layers + 2 + 1 + 6)


class _Sends(TorchDispatchMode):
    """Of a group's collectives the messages of two ranks, and the bytes that one of them sends."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.ranks = dist.get_process_group_ranks(group)
        self.messages = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            group = next((a for a in args if _counted._is_group(a)), None)
            if dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)) == self.ranks:
                self._sent(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _sent(self, name: str, args: Any) -> None:
        payload, kind = _counted.KINDS[name]
        tensors = args[payload]
        whole = sum(t.nbytes for t in ([tensors] if torch.is_tensor(tensors) else tensors))
        times = 2 if kind == "reduce" else 1
        self.messages += times
        self.bytes += times * whole // 2


def _of_rank(layout: Layout, options: dict[str, Any]) -> tuple[int, float, float]:
    """(stage, messages, bytes) of a microbatch."""
    _megatron.initialize(layout)
    configured = _saved.with_options(_megatron.transformer_config, options)
    with mock.patch.object(_megatron, "transformer_config", configured):
        model, _, config = _megatron.build(layout)
    config.finalize_model_grads_func = None
    batches = _data.general(layout, 0, 0)
    with _Sends(parallel_state.get_tensor_model_parallel_group()) as sends:
        get_forward_backward_func()(**_megatron.schedule(layout, model, batches))
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return stage, sends.messages / len(batches), sends.bytes / len(batches)
