"""Adapters fold into the weights, and come back from checkpoints in any layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state

from megatron_dr.config.lora import LoRAConfig
from megatron_dr.mcore.loop import partial_checkpoint
from megatron_dr.mcore.model import lora as plugin

from . import _data, _lora, _megatron
from ._data import Layout
from ._ranks import run_ranks


# -- merging -------------------------------------------------------------------------------------
def merged(layout: Layout, start: Any, lora: LoRAConfig) -> Any:
    """On a rank: losses before and after merging, weights' pieces after, and names."""
    _megatron.initialize(layout)
    config = _megatron.transformer_config(layout)
    _lora.use_adapters(lora)
    model, _, config = _megatron.build(layout, start)
    kwargs = {**_megatron.schedule(layout, model, _data.target(layout, 0, 0)), "forward_only": True}
    chunks = [chunk.module for chunk in model]
    for chunk in chunks:
        chunk.eval()
    losses = []
    for merge in (False, True):
        if merge:
            plugin.merge_lora(chunks)
        kwargs["data_iterator"] = iter(_data.target(layout, 0, 0))
        reports = _megatron.get_forward_backward_func()(**kwargs)
        losses.append([report["lm loss"][0] for report in reports])
    for chunk in chunks:
        assert not any("lora" in name for name in chunk.state_dict())
        assert not any("lora" in type(m).__module__ for m in chunk.modules())
        chunk.requires_grad_(True)
    return losses, _megatron.pieces(chunks, config)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2)], ids=["1", "tp2", "pp2"])
def test_merging_folds_the_adapters_into_the_weights(layout: Layout) -> None:
    lora = LoRAConfig(rank=4, alpha=6.0, dropout=0.5)  # not in evaluation
    start = _lora.initial(layout)
    ranks = run_ranks(layout.world, merged, layout, start, lora)
    before, after = ranks[-1][0]
    assert len(before) == layout.num_target
    torch.testing.assert_close(torch.stack(after), torch.stack(before), rtol=1e-5, atol=0)
    expected = _lora.effective(*_lora.split(start), lora.scale)
    found = _megatron.whole([pieces for _, pieces in ranks])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.reshape(-1), rtol=1e-6, atol=1e-6)


# -- checkpoints ---------------------------------------------------------------------------------
def sharded(model: list[Any]) -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {"model": model[0].sharded_state_dict(metadata={"dp_cp_group": group})}


def save(layout: Layout, start: Any, folder: Path, adapters: bool) -> None:
    """On a rank: a checkpoint of `start`, with adapters or without."""
    _megatron.initialize(layout)
    if adapters:
        _lora.use_adapters()
    model, _, _ = _megatron.build(layout, start)
    dist_checkpointing.save(sharded(model), str(folder))


def load(layout: Layout, start: Any, folder: Path) -> Any:
    """On a rank: pieces of a model with adapters that has loaded it."""
    _megatron.initialize(layout)
    _lora.use_adapters()
    model, _, config = _megatron.build(layout, start)
    state = partial_checkpoint.load(
        dist_checkpointing.load, sharded(model), str(folder), strict="raise_all"
    )
    model[0].module.load_state_dict(
        {name.removeprefix("module."): value for name, value in state["model"].items()}
    )
    model[0].module.requires_grad_(True)
    return _megatron.pieces(model, config)


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_checkpoints_of_adapters_load_in_another_layout(tmp_path: Path, tied: bool) -> None:
    """Gate and up of the gated layer's B come back in their places."""
    layout = Layout(tp=2, sequence_parallel=True, tied=tied)
    start, other = _lora.initial(layout), {k: v + 1 for k, v in _lora.initial(layout).items()}
    run_ranks(2, save, layout, start, tmp_path, True)
    for place in (layout, Layout(tied=tied), Layout(pp=2, tied=tied)):
        found = _megatron.whole(run_ranks(place.world, load, place, other, tmp_path))
        assert found.keys() == start.keys()
        for name, value in start.items():
            assert torch.equal(found[name], value.reshape(-1)), name


def test_checkpoint_without_adapters_leaves_their_initial_values(tmp_path: Path) -> None:
    base, adapters = _lora.split(_lora.initial(Layout()))
    run_ranks(2, save, Layout(tp=2), base, tmp_path, False)
    other = {name: value + 1 for name, value in base.items()}
    found = _megatron.whole(run_ranks(1, load, Layout(), {**other, **adapters}, tmp_path))
    for name, value in {**base, **adapters}.items():
        assert torch.equal(found[name], value.reshape(-1)), name
