"""Packed and unpacked samples: the same losses and the same gradient, in every layout."""

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_dr.mcore.data import packed

from . import _data, _megatron, _oracle
from ._data import Layout
from ._pairs import pairs, some
from ._ranks import run_ranks
from ._sample_check import MODES, check

PACKS = 4  # a step, over all data ranks


def batch(number: int) -> dict[str, torch.Tensor]:
    """The samples of a pack, not packed: two or three."""
    rows = [_data.sequence("general", 0, number, n, False) for n in range(2 + number % 2)]
    return {name: torch.stack([r[name] for r in rows]) for name in rows[0]}


def forward_step(losses: list[Any], data_iterator: Any, model: Any) -> Any:
    data = next(data_iterator)
    parameters = packed.parameters(data)
    output = model(data["tokens"], data["position_ids"], None, labels=data["labels"],
                   packed_seq_params=parameters)  # fmt: skip

    def loss(mask: torch.Tensor, output: torch.Tensor) -> Any:
        starts = parameters.cu_seqlens_q.tolist()[: int(data["num_packed"]) + 1]
        per_token = (output * mask).detach()[0]
        losses.append([float(per_token[a:b].sum()) for a, b in itertools.pairwise(starts)])
        return _megatron.loss_func(mask, output)

    return output, partial(loss, data["loss_mask"])


def train(layout: Layout, initial: Any) -> Any:
    """On a rank: losses of the samples of its packs, and the gradient's pieces."""
    _megatron.initialize(layout)
    model, _, config = _megatron.build(layout, initial)
    rank, share, losses = parallel_state.get_data_parallel_rank(), PACKS // layout.dp, []
    numbers = range(rank * share, (rank + 1) * share)
    iterators = [iter([_data.pack(batch(n)) for n in numbers]) for _ in model]
    for chunk in model:
        chunk.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=partial(forward_step, losses),
        data_iterator=iterators if layout.vpp else iterators[0],
        model=model if layout.vpp else model[0], num_microbatches=share,
        seq_length=_data.PACK, micro_batch_size=1, forward_only=False,
    )  # fmt: skip
    return losses, _megatron.pieces(model, config, "main_grad")


LAYOUTS = {
    "one": Layout(per_token=True),
    "TP 2 SP": Layout(tp=2, sequence_parallel=True, per_token=True),
    "PP 2": Layout(pp=2, per_token=True),
    "PP 4, stages in the middle": Layout(pp=4, per_token=True),
    "PP 2 VPP 2": Layout(pp=2, vpp=2, per_token=True),
    "DP 2": Layout(dp=2, per_token=True),
    "recompute": Layout(recompute=True, per_token=True),
    "q/k norms": Layout(qk_layernorm=True, per_token=True),
    "experts": Layout(moe=True, per_token=True),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_samples_have_the_losses_and_the_gradient_of_unpacked_ones(name: str) -> None:
    layout = LAYOUTS[name]
    initial = _oracle.initial(layout)
    ranks = run_ranks(layout.world, train, layout, initial)
    p = {k: v.double().requires_grad_() for k, v in initial.items()}
    expected, tokens = [], 0.0
    for n in range(PACKS):
        data = batch(n)
        losses = torch.stack([
            (_oracle.token_losses(p, t, y) * m).sum()
            for t, y, m in zip(data["tokens"], data["labels"], data["loss_mask"], strict=True)
        ])  # fmt: skip
        losses.sum().backward()
        expected += losses.tolist()
        tokens += float(data["loss_mask"].sum())
    last = [r for r, (losses, _) in enumerate(ranks) if losses]
    per_data_rank = [ranks[r][0] for r in last][:: layout.tp]
    found = [loss for losses in per_data_rank for pack in losses for loss in pack]
    assert found == pytest.approx(expected, rel=1e-5)
    gradient = _megatron.whole([pieces for _, pieces in ranks])
    for key, value in p.items():
        assert value.grad is not None
        error = float((gradient[key].double() * tokens - value.grad.reshape(-1)).abs().max())
        assert error < 1e-5 * max(1.0, float(value.grad.abs().max())), f"{key}: {error:.2e}"


ROWS = {
    "exact": Layout(),
    "ghost": Layout(per_token=True),
    "cone": Layout(per_token=True),
    "cone ghost": Layout(),
    "filter": Layout(per_token=True),
    "mean with alpha": Layout(),
    "layer": Layout(per_token=True),
    "model two passes": Layout(),
    "matrix two passes": Layout(per_token=True),
    "step": Layout(),
    "step cone": Layout(per_token=True),
    "step two passes": Layout(),
    "streaming ghost": Layout(per_token=True),
    "refresh": Layout(),
}
ROW_LAYOUTS = {
    "TP 2 SP": Layout(tp=2, sequence_parallel=True, full_masks=True),  # samples in both shares
    "PP 2 VPP 2": Layout(pp=2, vpp=2, per_token=True),
    "DP 2": Layout(dp=2, per_token=True),
    "TP 2 PP 2 tied SP": Layout(tp=2, pp=2, tied=True, sequence_parallel=True, per_token=True),
    "biases TP 2 SP": Layout(layer_norm=True, tp=2, sequence_parallel=True, full_masks=True),
    "q/k norms": Layout(qk_layernorm=True, recompute=True),
    "DP 2 sharded": Layout(dp=2, distributed_optimizer=True, overlap=True),
}
ROW_MODES = ("exact", "step cone")
ROWS_KEPT = ("cone ghost", "filter", "matrix two passes", "step", "streaming ghost", "refresh")


@pytest.mark.parametrize("mode", some({name: name for name in ROWS}, *ROWS_KEPT))
def test_rows_are_the_samples_inside_packs(mode: str) -> None:
    """Against a loop over unpacked samples; packs have two samples or three, and padding."""
    check(replace(ROWS[mode], packed=True), MODES[mode])


@pairs(ROW_LAYOUTS, ROW_MODES)
def test_rows_inside_packs_in_a_layout(first: str, second: str) -> None:
    check(replace(ROW_LAYOUTS[first], packed=True), MODES[second])
