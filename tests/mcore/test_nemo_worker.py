"""NeMo-RL's worker class without NeMo-RL, which needs Ray and a GPU: in its place one with the same
names, whose `train` is an engine's forward and backward and Megatron's step."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_dr import DRConfig
from megatron_dr.mcore.attach import attached
from megatron_dr.mcore.hosts import nemo_rl

from . import _data, _hosts, _megatron
from ._data import Layout
from ._layouts import config
from ._ranks import run_ranks

NAME = "nemo_rl.models.policy.workers.megatron_policy_worker"
LAYOUT = Layout(distributed_optimizer=True, targets=2)


class Worker:
    """As NeMo-RL's: parameters that are moved are given back by the next step."""

    def __init__(self, layout: Layout, tokenizer: Any, weights_path: str | None = None) -> None:
        self.engine = _hosts.Engine(layout, summed=True)
        (self.model,), self.optimizer = self.engine.model, self.engine.optimizer
        self._router_replay_enabled = tokenizer == "replay"
        if tokenizer == "experts":  # no model is run with it
            self.engine.config.num_moe_experts, self.engine.config.moe_aux_loss_coeff = 4, [0, 0.1]

    def train(self, data: Any, loss_fn: Any, eval_mode: bool = False, *_: Any) -> Any:
        found = []
        for batches in data:
            self.engine.zero_grad()
            found.append(self.engine.forward_backward(batches, forward_only=eval_mode))
            if not eval_mode:
                self.optimizer.step()
        return found

    def save_checkpoint(self, weights_path: str) -> None:
        Path(weights_path).mkdir(exist_ok=True)

    def offload_before_refit(self) -> None:
        pass


def _class(dr: DRConfig, monkeypatch: pytest.MonkeyPatch, seen: list[int]) -> Any:
    """Ours, of the stand-in."""
    parts = NAME.split(".")
    for number in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:number]), ModuleType(parts[number - 1]))
    module = ModuleType(NAME)
    module.MegatronPolicyWorkerImpl = Worker  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, NAME, module)
    monkeypatch.setattr(
        nemo_rl, "forward_backward", lambda worker, batch, *_: worker.engine.forward_backward(batch)
    )

    def target(worker: Any, _: Any) -> Any:
        seen.append(attached(worker.model).steps)
        return _data.target(LAYOUT, 0, 0)

    return nemo_rl.worker_class(dr, target)


def _in_a_worker(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _megatron.initialize(LAYOUT)
    seen: list[int] = []
    made = _class(config(LAYOUT, _hosts.PROBLEM), monkeypatch, seen)
    worker = made(LAYOUT, None)
    batches = [_data.general(LAYOUT, step, 0) for step in range(2)]
    worker.train(batches, None)
    handle = attached(worker.model)
    assert seen == [0, 1] and handle.steps == 2  # a target batch for each global batch
    worker.train(batches, None, True)
    assert seen == [0, 1] and handle.steps == 2 and _hosts.untouched()
    worker.save_checkpoint(str(folder / "weights"))
    assert (folder / "weights" / "megatron_dr.json").is_file()
    worker.offload_before_refit()
    worker.train(batches[:1], None)
    assert handle.steps == 3
    again = made(LAYOUT, None, str(folder / "weights"))
    assert attached(again.model).steps == 2
    for tokenizer, says in (("replay", "router replay"), ("experts", "moe_aux_loss_coeff in Ne")):
        with pytest.raises(ValueError, match=says):
            made(LAYOUT, tokenizer)


def test_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One target batch a step, none in evaluation; the state goes with the weights and comes back;
    what would be wrong in silence is refused."""
    run_ranks(1, _in_a_worker, tmp_path, monkeypatch)
