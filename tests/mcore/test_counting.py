"""Each parameter is counted once: its own gram equals the dense one, by kind of parameter."""

from typing import Any

import numpy as np
import pytest
import torch

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore.attach import attached

from . import _megatron, _oracle
from ._data import Layout
from ._ranks import run_ranks

LAYER = "decoder.layers.2."
KINDS = {
    "column": (Layout(tp=2), LAYER + "self_attention.linear_qkv.weight"),
    "column-gated": (Layout(tp=2), LAYER + "mlp.linear_fc1.weight"),
    "row": (Layout(tp=2), LAYER + "mlp.linear_fc2.weight"),
    "column-bias": (Layout(tp=2, layer_norm=True), LAYER + "mlp.linear_fc1.bias"),
    "row-bias": (Layout(tp=2, layer_norm=True), LAYER + "mlp.linear_fc2.bias"),
    "row-bias-sp": (
        Layout(tp=2, layer_norm=True, sequence_parallel=True),
        LAYER + "mlp.linear_fc2.bias",
    ),
    "vocabulary": (Layout(tp=2), "embedding.word_embeddings.weight"),
    "norm-replicated": (Layout(tp=2), LAYER + "input_layernorm.weight"),
    "norm-sequence-parallel": (
        Layout(tp=2, sequence_parallel=True),
        LAYER + "input_layernorm.weight",
    ),
    "norm-of-heads": (
        Layout(tp=2, qk_layernorm=True),
        LAYER + "self_attention.q_layernorm.weight",
    ),
    "tied-one-stage": (Layout(tied=True), "embedding.word_embeddings.weight"),
    "tied-two-stages": (Layout(pp=2, tied=True), "embedding.word_embeddings.weight"),
    "tied-sharded": (
        Layout(tp=2, pp=2, tied=True, sequence_parallel=True),
        "embedding.word_embeddings.weight",
    ),
    "expert": (
        Layout(moe=True, ep=2, dp=2),
        LAYER + "mlp.experts.local_experts.3.linear_fc1.weight",
    ),
    "expert-over-tp": (
        Layout(moe=True, tp=2, sequence_parallel=True, ep=2),
        LAYER + "mlp.experts.local_experts.2.linear_fc2.weight",
    ),
    "expert-replicated-over-tp": (
        Layout(moe=True, tp=2, sequence_parallel=True),
        LAYER + "mlp.experts.local_experts.1.linear_fc1.weight",
    ),
    "router-sequence-parallel": (
        Layout(moe=True, tp=2, sequence_parallel=True, ep=2, dp=2),
        LAYER + "mlp.router.weight",
    ),
}  # fmt: skip


def gram_of_one_step(layout: Layout, kind: Any, initial: Any) -> dict[str, np.ndarray]:
    dr = DRConfig(
        rows="slot" if layout.slots > 1 else "rank", slots=layout.slots, blocks="matrix", gram=kind
    )
    model, _, _, log = _megatron.train(
        layout, 1, initial, lambda m, o, c: megatron_dr.attach(m, o, c, dr)
    )
    handle = attached(model)
    assert handle is not None
    return dict(zip(handle.rows.layout.names, log[0][1].gram_BRR.numpy(), strict=True))


@pytest.mark.parametrize("layout, name", KINDS.values(), ids=KINDS.keys())
def test_counted_once(layout: Layout, name: str) -> None:
    initial = _oracle.initial(layout)
    grams = run_ranks(layout.world, gram_of_one_step, layout, "exact", initial)[0]
    parameters = {k: v.double().requires_grad_() for k, v in initial.items()}
    general, target = _oracle.rows(layout, parameters, 0)
    dense = torch.stack([g[name].reshape(-1) for g in [*general, target]])
    # rows are in the units of Megatron's buffers before it averages: the schedule divides by all
    # microbatches, and data ranks are not averaged yet
    units = layout.dp * layout.num_general / (layout.num_general + layout.num_target)
    expected = (dense @ dense.T).numpy() * units**2
    np.testing.assert_allclose(grams[name], expected, rtol=0, atol=2e-5 * np.trace(expected))
