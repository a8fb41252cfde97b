"""The hosts' own modules, where they are installed: without a GPU, on a model of these tests.

None is a dependency. docs/rl_systems.md says how to install them for these tests, and with which
versions they ran. What is compared is what test_hosts.py compares.
"""

import ast
import dataclasses
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import types
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace as Names
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_dr import DRConfig
from megatron_dr.mcore import hosts
from megatron_dr.mcore.attach import attached
from megatron_dr.mcore.hosts import nemo_rl

from . import _data, _megatron, _oracle, _slime
from ._data import Layout
from ._hosts import PROBLEM, STEPS, expect, in_slime, untouched
from ._layouts import config
from ._ranks import run_ranks


# -- verl ----------------------------------------------------------------------------------------
def verl_batch(batches: list[dict[str, torch.Tensor]]) -> Any:
    """Sequences as verl's workers get them: whole texts, the mask of what is learned."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    text = [torch.cat([b["tokens"], b["labels"][-1:]]) for b in batches]
    mask = [torch.cat([torch.zeros(1), b["loss_mask"]]) for b in batches]
    nested = partial(torch.nested.as_nested_tensor, layout=torch.jagged)
    data = TensorDict(
        {"input_ids": nested(text), "loss_mask": nested(mask),
         "temperature": torch.ones(len(batches))},
        batch_size=len(batches),
    )  # fmt: skip
    tu.assign_non_tensor(data, use_dynamic_bsz=False, micro_batch_size_per_gpu=1)
    return data


def in_verl(layout: Layout, dr: DRConfig, folder: Path) -> Any:
    from verl.utils.megatron_utils import (
        load_megatron_model_to_gpu,
        register_megatron_training_hooks,
    )
    from verl.workers.config import McoreEngineConfig
    from verl.workers.utils.losses import sft_loss

    from megatron_dr.mcore.hosts import verl

    _megatron.initialize(layout)
    rank = parallel_state.get_data_parallel_rank()
    step = 0
    kind = verl.engine_class(dr, lambda engine, data: verl_batch(_data.target(layout, step, rank)))
    engine: Any = object.__new__(kind)  # __init__ and initialize need a pretrained model
    engine.module, engine.optimizer, engine.tf_config = _megatron.build(
        dataclasses.replace(layout, overlap=False), _oracle.initial(layout)
    )
    engine.tf_config.variable_seq_lengths = True  # as verl sets it
    engine.tf_config.finalize_model_grads_func = None
    register_megatron_training_hooks(engine.module, engine.optimizer)
    engine.engine_config = McoreEngineConfig(use_remove_padding=False, use_fused_kernels=False)
    engine.model_config = Names(
        mtp=Names(enable=False, enable_train=False), hf_config=Names(architectures=["Any"]),
        tokenizer=Names(pad_token_id=0), model_type="language_model",
    )  # fmt: skip
    engine.enable_routing_replay = engine.is_value_model = False
    engine._is_offload_param = engine._is_offload_optimizer = False
    loss, outputs = partial(sft_loss, None), []
    engine.checkpoint_mananager = Names(  # verl's name
        save_checkpoint=lambda **_: None, load_checkpoint=lambda **_: None
    )
    for step in range(STEPS):
        data = _data.general(layout, step, rank)
        if step == 1:  # between steps: a checkpoint, another handle, a move to the CPU
            engine.save_checkpoint(str(folder))
            attached(engine.module).detach()
            hosts.attach(engine.module, engine.optimizer, dr)
            engine.load_checkpoint(str(folder))
            assert attached(engine.module).steps == 1
            engine.to("cpu", model=True, optimizer=False, grad=True)
            assert attached(engine.module).offload() == 0  # freed already
            load_megatron_model_to_gpu(engine.module, load_frozen_params=False)
        with engine.eval_mode():
            engine.infer_batch(verl_batch(data), loss_function=None)
        with engine.train_mode():
            outputs.append(engine.train_batch(verl_batch(data), loss_function=loss))
    assert untouched() and attached(engine.module).steps == STEPS
    if parallel_state.is_pipeline_last_stage():
        for output in outputs:
            assert len(output["loss"]) == len(output["model_output"]["log_probs"].unbind())
            assert output["metrics"]["target loss"] > 0 and "dr cos update" in output["metrics"]
    return _megatron.pieces(engine.module, engine.tf_config)


@pytest.mark.parametrize(
    "layout",
    [Layout(dp=2, distributed_optimizer=True, targets=2),
     Layout(pp=2, distributed_optimizer=True, targets=2)],
    ids=["dp2", "pp2"],
)  # fmt: skip
def test_verls_own_engine(layout: Layout, tmp_path: Path) -> None:
    pytest.importorskip("verl.workers.engine.megatron.transformer_impl")
    ranks = run_ranks(layout.world, in_verl, layout, config(layout, PROBLEM), tmp_path)
    expect(dataclasses.replace(layout, per_token=True), ranks)


def test_verl_takes_the_registered_engine(tmp_path: Path) -> None:
    """The module of docs/rl_systems.md, imported while verl itself is."""
    if importlib.util.find_spec("verl") is None:
        pytest.skip("verl is not installed")
    (tmp_path / "my_target.py").write_text(
        "from megatron_dr import DRConfig\n"
        "from megatron_dr.mcore.hosts import verl\n"
        "verl.register(DRConfig(rows='rank'), None)\n"
    )
    code = (
        "from megatron_dr.mcore import cpu; cpu.enable()\n"
        "from verl.workers.engine import EngineRegistry\n"
        "print(EngineRegistry.get_engine_cls('language_model', 'megatron').__name__)"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "VERL_USE_EXTERNAL_MODULES": "my_target"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, text=True,
                         capture_output=True, check=True).stdout  # fmt: skip
    assert out.split()[-1] == "RegularisedEngine"


# -- slime ---------------------------------------------------------------------------------------
def test_slimes_own_loop() -> None:
    pytest.importorskip(_slime.PACKAGE + ".model")
    layout = Layout(dp=2, distributed_optimizer=True, targets=2)
    expect(layout, run_ranks(2, in_slime, layout, config(layout, PROBLEM), True))


# -- NeMo-RL -------------------------------------------------------------------------------------
class Unused(MetaPathFinder, Loader):
    """What NeMo-RL imports and these tests don't use: Megatron-Bridge and two loggers."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        unused = name.startswith("megatron.bridge") or name.split(".")[0] in ("mlflow", "swanlab")
        return ModuleSpec(name, self, is_package=True) if unused else None

    def exec_module(self, module: types.ModuleType) -> None:
        def thing(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = thing  # type: ignore[method-assign]


def nemo_batch(batches: list[dict[str, torch.Tensor]]) -> Any:
    """Sequences as NeMo-RL's workers get them."""
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

    text = [torch.cat([b["tokens"], b["labels"][-1:]]) for b in batches]
    mask = [torch.cat([torch.zeros(1), b["loss_mask"]]) for b in batches]
    return BatchedDataDict(
        input_ids=torch.stack(text), token_mask=torch.stack(mask),
        input_lengths=torch.full((len(text),), _data.LENGTH + 1),
        sample_mask=torch.ones(len(text)),
    )  # fmt: skip


def in_nemo(layout: Layout, dr: DRConfig) -> Any:
    """`forward_backward` is what the worker's `train` does before `optimizer.step`."""
    from nemo_rl.algorithms.loss.loss_functions import NLLLossFn

    forward_backward = nemo_rl.forward_backward
    _megatron.initialize(layout)
    rank = parallel_state.get_data_parallel_rank()
    model, optimizer, cfg = _megatron.build(layout, _oracle.initial(layout))
    off = {"enabled": False}
    worker = Names(
        model=model[0], optimizer=optimizer, sampling_params=None, defer_fp32_logits=False,
        mcore_state=Names(straggler_timer=None), delegate_pack_to_model=False,
        delegate_mtp_loss_mask_to_model=False, model_slices_context_parallel_inputs=False,
        cfg={"train_micro_batch_size": 1, "sequence_packing": off, "dynamic_batching": off,
             "megatron_cfg": {}},
    )  # fmt: skip
    for step in range(STEPS):
        target = nemo_batch(_data.target(layout, step, rank))
        handle = hosts.attach(worker.model, optimizer, dr)
        model[0].zero_grad_buffer()
        optimizer.zero_grad()
        with hosts.regularised(handle, partial(forward_backward, worker, target, NLLLossFn())):
            general = nemo_batch(_data.general(layout, step, rank))
            reports = forward_backward(worker, general, NLLLossFn())
        assert len(reports) == general.size and all("num_unmasked_tokens" in r for r in reports)
        optimizer.step()
    assert untouched() and handle.steps == STEPS
    return _megatron.pieces(model, cfg)


def test_nemo_rls_own_forward_and_backward() -> None:
    sys.meta_path.append(Unused())
    pytest.importorskip("nemo_rl.models.megatron.train")
    layout = Layout(dp=2, distributed_optimizer=True, per_token=True, targets=2)
    expect(layout, run_ranks(2, in_nemo, layout, config(layout, PROBLEM)))


def test_nemo_rls_worker_as_it_is_written() -> None:
    """Read, not run: its worker imports names that the Megatron-Core of these tests has not."""
    found = importlib.util.find_spec("nemo_rl")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("nemo_rl is not installed")
    root = Path(found.submodule_search_locations[0]) / "models/policy"
    worker = ast.parse((root / "workers/megatron_policy_worker.py").read_text())
    methods = {n.name: n for n in ast.walk(worker) if isinstance(n, ast.FunctionDef)}
    arguments = [a.arg for a in methods["train"].args.args]
    assert arguments[:6] == ["self", "data", "loss_fn", "eval_mode", "gbs", "mbs"]
    called = [ast.unparse(n.func) for n in ast.walk(methods["train"]) if isinstance(n, ast.Call)]
    ours = ["process_global_batch", "get_microbatch_iterator", "LossPostProcessor",
            "megatron_forward_backward", "self.model.zero_grad_buffer",
            "self.optimizer.step"]  # fmt: skip
    assert [called.count(name) for name in ours] == [1] * len(ours)
    lines = ast.unparse(methods["train"])
    order = [lines.index(f"{name}(") for name in ours[4:5] + ours[3:4] + ours[5:]]
    assert order == sorted(order)  # zeroed, forward and backward, the optimizer's step
    mine = set(re.findall(r"worker\.(\w+)", inspect.getsource(nemo_rl.forward_backward)))
    assert mine and all(f"self.{name}" in lines for name in mine)
    policy = ast.unparse(ast.parse((root / "lm_policy.py").read_text()))
    assert "worker_builder_cls_fqn = worker_extension_cls_fqn" in policy
