"""Loops in the shape of each host's (docs/rl_systems.md), and what they must give."""

from functools import partial
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_dr import DRConfig
from megatron_dr.mcore import compat, hosts
from megatron_dr.mcore.attach import attached

from . import _data, _layouts, _megatron, _oracle, _slime
from ._data import Layout
from ._problem import Problem

STEPS, PROBLEM = _layouts.STEPS, Problem()
STOCK = {name: getattr(schedules, name) for name in hosts.SCHEDULES}


def untouched() -> bool:
    return all(getattr(schedules, name) is function for name, function in STOCK.items())


class Engine:
    """A host with one function for forward and backward: verl's engine, NeMo-RL's worker.

    Losses are means over the tokens of the batch that it is given, on all ranks, whatever Megatron
    divides by: as (loss, report) multiplied by the batch's number of microbatches.

    Args:
        summed: Megatron's DDP sums over data ranks (calculate_per_token_loss), as NeMo-RL has it.
    """

    def __init__(self, layout: Layout, summed: bool) -> None:
        self.layout, self.summed = layout, summed
        self.model, self.optimizer, self.config = _megatron.build(layout, _oracle.initial(layout))
        groups = ProcessGroupCollection.use_mpu_process_groups()
        hook = partial(finalize_model_grads, pg_collection=groups) if summed else None
        self.config.finalize_model_grads_func = hook or finalize_model_grads  # once, at set-up

    def forward_backward(self, batches: list[Any], forward_only: bool = False) -> list[Any]:
        group = parallel_state.get_data_parallel_group()
        tokens = sum((b["loss_mask"].sum() for b in batches), torch.zeros([]))
        torch.distributed.all_reduce(tokens, group=group)
        ranks = 1 if self.summed else torch.distributed.get_world_size(group)

        def loss_func(mask: torch.Tensor, output: Any) -> tuple[Any, ...]:
            output = output if self.summed else output["losses"]
            loss = (output.float().reshape(-1) * mask.reshape(-1)).sum() / tokens * ranks
            return loss * len(batches), {"loss": loss.item(), "count": len(batches)}

        def forward_step(data: Any, model: Any) -> Any:
            output, loss = _megatron.forward_step(data, model)
            if not self.summed and compat.unwrap(model).post_process:
                output = {"losses": output}  # verl's last stage has several outputs
            return output, partial(loss_func, *loss.args)

        arguments = _megatron.schedule(self.layout, self.model, batches)
        arguments |= {"forward_step_func": forward_step, "forward_only": forward_only}
        return get_forward_backward_func()(**arguments)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        for chunk in self.model:
            chunk.zero_grad_buffer()


def in_an_engine(layout: Layout, summed: bool, dr: DRConfig) -> Any:
    _megatron.initialize(layout)
    engine = Engine(layout, summed)
    rank, last = parallel_state.get_data_parallel_rank(), parallel_state.is_pipeline_last_stage()
    hook = engine.config.finalize_model_grads_func
    for step in range(STEPS):
        general, target = _data.general(layout, step, rank), _data.target(layout, step, rank)
        handle = hosts.attach(engine.model, engine.optimizer, dr)
        assert handle is attached(engine.model) and handle.steps == step  # attached once
        with hosts.regularised(handle, partial(engine.forward_backward, target)) as training:
            with torch.no_grad():
                known = engine.forward_backward(general, forward_only=True)
            engine.zero_grad()
            reports = engine.forward_backward(general)
            engine.optimizer.step()
        assert len(known) == len(reports) and training.steps == 1
        if last:  # the host's own reports, of the general microbatches, in their order
            assert [r["loss"] for r in reports] == pytest.approx([r["loss"] for r in known])
            assert [r["count"] for r in reports] == [len(general)] * len(general)
            assert [r["count"] for r in training.target_reports] == [len(target)] * len(target)
        assert untouched() and engine.config.finalize_model_grads_func is hook
        engine.zero_grad()
    handle.detach()
    assert attached(engine.model) is None
    return _megatron.pieces(engine.model, engine.config)


def expect(layout: Layout, ranks: list[Any]) -> None:
    """The oracle's parameters after as many steps."""
    found = _megatron.whole(ranks)
    parameters, _, _ = _layouts.expected(layout.alone, PROBLEM)
    for name, value in parameters.items():
        torch.testing.assert_close(
            found[name].double(), value.reshape(-1), rtol=0, atol=2e-5, msg=name
        )


slime_hook: Any = None  # slime loads it by its path


def in_slime(layout: Layout, dr: DRConfig, installed: bool = False) -> Any:
    global slime_hook
    import importlib

    from megatron_dr.mcore.hosts import slime

    _megatron.initialize(layout)
    _slime.on_cpu() if installed else _slime.stand_in()
    loop = importlib.import_module(_slime.PACKAGE + ".model")
    get_data_iterator = importlib.import_module(_slime.PACKAGE + ".data").get_data_iterator
    model, optimizer, cfg = _megatron.build(layout, _oracle.initial(layout))
    _slime.dense(model)
    scheduler, rank = _slime.scheduler(optimizer), parallel_state.get_data_parallel_rank()
    _slime.arguments("tests.mcore._hosts.slime_hook")
    asked = []

    def target(args: Any, rollout_id: int, step_id: int) -> Any:
        asked.append(2 * rollout_id + step_id)
        return _slime.rollout([_data.target(layout, asked[-1], rank)])

    slime_hook = slime.before_train_step(dr, target)
    for rollout_id, steps in enumerate([(0, 1), (2,)]):
        data = _slime.rollout([_data.general(layout, step, rank) for step in steps])
        loop.train(rollout_id, model, optimizer, scheduler, get_data_iterator(data),
                   data["num_microbatches"], data["global_batch_sizes"])  # fmt: skip
        assert untouched() and cfg.finalize_model_grads_func is finalize_model_grads
    model[0].role = "critic"
    slime_hook(None, 2, 0, model, optimizer, scheduler)
    assert untouched() and asked == [0, 1, 2] and attached(model).steps == STEPS
    return _megatron.pieces(model, cfg)
