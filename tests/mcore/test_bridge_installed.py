"""Megatron-Bridge's own training step and callbacks, where it is installed: without a GPU.

It is no dependency; docs/rl_systems.md says how to install it for these tests. Transformer Engine,
which Bridge's adapters import, and energon, one of its data loaders, are stood in for by modules
that do nothing.
"""

import dataclasses
import importlib
import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from types import SimpleNamespace as Names
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.num_microbatches_calculator import (
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_dr import DRConfig
from megatron_dr.mcore.attach import attached
from megatron_dr.mcore.hosts import bridge, state

from . import _data, _megatron, _oracle, _slime
from ._data import Layout
from ._hosts import PROBLEM, STEPS, expect, untouched
from ._layouts import config
from ._ranks import run_ranks


class Absent(ModuleType):
    """Has classes and modules of any name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {}) if name[0].isupper() else Absent(name)


def bridge_installed() -> None:
    """Skips where it is not."""
    if importlib.util.find_spec("megatron.bridge") is None:
        pytest.skip("Megatron-Bridge is not installed")
    importlib.import_module("megatron.core.extensions.transformer_engine")  # sees that it is absent
    for name in ("transformer_engine", "transformer_engine.pytorch", "megatron.energon"):
        sys.modules.setdefault(name, Absent(name))
    pytest.importorskip("megatron.bridge.training.train")


def in_bridge(layout: Layout, dr: DRConfig, folder: Path) -> Any:
    bridge_installed()
    train = importlib.import_module("megatron.bridge.training.train")
    callbacks = importlib.import_module("megatron.bridge.training.callbacks")
    names = importlib.import_module("megatron.bridge.training.utils.checkpoint_utils")
    states = importlib.import_module("megatron.bridge.training.state")
    _megatron.initialize(layout)
    rank = parallel_state.get_data_parallel_rank()
    ranks = parallel_state.get_data_parallel_world_size()
    asked = []

    def target(context: Any, steps: int) -> Any:
        asked.append(steps)
        step = steps
        while True:
            yield from _data.target(layout, step, rank)
            step += 1

    batch = len(_data.target(layout, 0, rank)) * ranks
    manager = callbacks.normalize_callbacks([bridge.callback(dr, target, batch)])
    model, optimizer, cfg = _megatron.build(layout, _oracle.initial(layout))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    cfg.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=groups)
    number = len(_data.general(layout, 0, rank))
    unset_num_microbatches_calculator()
    init_num_microbatches_calculator(0, None, number * ranks, 1, ranks, False)
    off = dict.fromkeys(
        ["empty_unused_memory_level", "check_optimizer_step_success", "qk_clip",
         "skip_sync_grad_norm_across_mp", "reuse_grad_buf_for_mxfp8_param_ag",
         "overlap_param_gather", "log_num_zeros_in_grad", "barrier_with_L1_time",
         "use_decentralized_pg"], 0,
    )  # fmt: skip
    part = Names(**off, micro_batch_size=1, seq_length=_data.LENGTH, dataloader_type="single",
                 load=None, save=str(folder))  # fmt: skip
    settings = Names(
        train=part, optimizer=part, ddp=part, dataset=part, model=part, dist=part,
        checkpoint=part, data_parallel_size=ranks,
    )  # fmt: skip
    global_state = Names(
        cfg=settings,
        timers=_Timers(),
        train_state=states.TrainState(),
        energy_monitor=None,
        async_calls_queue=None,
    )
    scheduler = _slime.scheduler(optimizer)
    schedule = get_forward_backward_func()  # Bridge takes it once, before its callbacks begin
    context = partial(callbacks.CallbackContext, state=global_state, model=model,
                      optimizer=optimizer, scheduler=scheduler)  # fmt: skip
    manager.fire("on_train_start", context())
    losses = []
    for step in range(STEPS):
        data = iter(_data.general(layout, step, rank))
        manager.fire("on_train_step_start", context())
        loss_dict, skipped, *_ = train.train_step(
            _megatron.forward_step, data, model, optimizer, scheduler, global_state, groups,
            schedule, P2PCommunicator(pp_group=groups.pp, config=cfg),
        )  # fmt: skip
        manager.fire("on_train_step_end", context(loss_dict=loss_dict, skipped_iter=skipped))
        losses.append(loss_dict)
        global_state.train_state.step += 1
        if step == 1 and torch.distributed.get_rank() == 0:
            tracker = names.get_checkpoint_train_state_filename(str(folder), names.TRACKER_PREFIX)
            torch.save(global_state.train_state.state_dict(), tracker)
        torch.distributed.barrier()
        if step == 1:
            manager.fire("on_checkpoint_save", context())
    handle = attached(model)
    assert handle is not None and handle.steps == STEPS and asked == [0]
    manager.fire("on_train_step_start", context())
    with pytest.raises(RuntimeError, match="was not regularised"):  # also when steps were before
        manager.fire("on_train_step_end", context(loss_dict={}, skipped_iter=False))
    if parallel_state.is_pipeline_last_stage():
        assert all("target loss" in each and "dr cos update" in each for each in losses)
    assert state.load(handle, bridge._loaded(str(folder), 2)) and handle.steps == 2
    manager.fire("on_train_end", context())
    assert untouched()
    return _megatron.pieces(model, cfg)


class _Timers:
    def __call__(self, *_: Any, **__: Any) -> "_Timers":
        return self

    def start(self, *_: Any, **__: Any) -> None: ...
    def stop(self, *_: Any, **__: Any) -> None: ...


@pytest.mark.parametrize(
    "layout",
    [Layout(dp=2, distributed_optimizer=True, per_token=True, targets=2),
     Layout(pp=2, vpp=2, distributed_optimizer=True, per_token=True, targets=2)],
    ids=["dp2", "pp2-vpp2"],
)  # fmt: skip
def test_bridges_own_training_step(layout: Layout, tmp_path: Path) -> None:
    bridge_installed()
    ranks = run_ranks(layout.world, in_bridge, layout, config(layout, PROBLEM), tmp_path)
    expect(dataclasses.replace(layout, per_token=True), ranks)
