"""RL systems that call Megatron's schedules themselves: the adapters in their order of calls.

Loops here are in the shape of each host's (`_hosts`). test_hosts_installed.py runs the hosts' own.
"""

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_dr import DRConfig
from megatron_dr.mcore import hosts

from . import _data, _megatron
from ._data import Layout
from ._hosts import PROBLEM, Engine, expect, in_an_engine, in_slime, untouched
from ._layouts import config
from ._ranks import run_ranks


@pytest.mark.parametrize(
    "layout, summed",
    [
        (Layout(pp=2, vpp=2, targets=2), False),
        (Layout(dp=2, distributed_optimizer=True, overlap=True, targets=2), False),
        (Layout(dp=2, distributed_optimizer=True, per_token=True, targets=2), True),
    ],
    ids=["verl-pp2-vpp2", "verl-dp2", "nemo-rl-dp2"],
)
def test_an_engine_with_one_function(layout: Layout, summed: bool) -> None:
    dr = config(layout, PROBLEM)
    ranks = run_ranks(layout.world, in_an_engine, layout, summed, dr)
    expect(dataclasses.replace(layout, per_token=True), ranks)  # means over tokens


# -- what is refused, and what is put back -----------------------------------------------------
def one_engine() -> Engine:
    _megatron.initialize(Layout())
    return Engine(Layout(), summed=False)


def misused() -> None:
    engine = one_engine()
    handle = hosts.attach(engine.model, engine.optimizer, DRConfig(rows="slot", slots=4))
    assert hosts.attach(engine.model[0], engine.optimizer, handle.dr) is handle  # one chunk alone
    general, target = _data.general(Layout(), 0, 0), _data.target(Layout(), 0, 0)
    parameters = [p.detach().clone() for p in engine.model[0].parameters()]
    run = engine.forward_backward
    for provider, words in {
        lambda: None: "returned without one",
        lambda: run(target, forward_only=True): "returned without one",
        lambda: next(iter([])): "target data ended",
    }.items():
        with pytest.raises(RuntimeError, match=words), hosts.regularised(handle, provider):
            run(general)
        assert untouched() and not hosts.reaching()

    def step(target: Any, **changes: Any) -> None:
        with hosts.regularised(handle, partial(run, target)):
            run(general, **changes)

    with pytest.raises(ValueError, match="needs target data"):
        step([])
    with pytest.raises(RuntimeError, match="was not regularised"):
        step(target, forward_only=True)
    hosts.regularise_next(handle, partial(run, target))
    with pytest.raises(RuntimeError, match="was not regularised"):
        hosts.regularise_next(handle, partial(run, target))
    engine.config.finalize_model_grads_func = None
    with pytest.raises(RuntimeError, match="finalize_model_grads_func is not set"):
        step(target)
    assert untouched() and handle.steps == 0
    assert all(
        torch.equal(a, b) for a, b in zip(parameters, engine.model[0].parameters(), strict=True)
    )


def test_misuse_is_told_and_leaves_no_trace() -> None:
    run_ranks(1, misused)


@pytest.mark.parametrize(
    "dr",
    [DRConfig(rows="sample"), DRConfig(rows="domain", domains=("a", "b")),
     DRConfig(rows="rank", target_ranks=1),
     DRConfig(alpha_style="auto", alpha_steps=9, target_size=9)],
)  # fmt: skip
def test_rows_that_a_host_cannot_give(dr: DRConfig) -> None:
    with pytest.raises(ValueError, match="in a host that makes its own microbatches"):
        hosts.attach([], None, dr)


def of_another_length() -> None:
    layout = Layout(pp=2)
    _megatron.initialize(layout)
    engine = Engine(layout, summed=False)
    handle = hosts.attach(engine.model, engine.optimizer, DRConfig(rows="slot", slots=4))
    general, target = _data.general(layout, 0, 0), _data.target(layout, 0, 0)

    def shorter() -> None:
        arguments = _megatron.schedule(layout, engine.model, target) | {"seq_length": 4}
        get_forward_backward_func()(**arguments)

    words = "target microbatches have seq_length 4"
    with pytest.raises(ValueError, match=words), hosts.regularised(handle, shorter):
        engine.forward_backward(general)


def test_stages_exchange_one_shape() -> None:
    run_ranks(2, of_another_length)


def two_models() -> None:
    """An actor and a critic in one process: the steps of the other one are Megatron's own."""
    actor = one_engine()
    critic = Engine(Layout(), summed=False)
    handle = hosts.attach(actor.model, actor.optimizer, DRConfig(rows="slot", slots=4))
    general, target = _data.general(Layout(), 0, 0), _data.target(Layout(), 0, 0)
    for engine in (actor, critic):
        engine.zero_grad()
    with hosts.regularised(handle, partial(actor.forward_backward, target)):
        critic.forward_backward(general)
        actor.forward_backward(general)
    alone = Engine(Layout(), summed=False)
    alone.zero_grad()
    alone.forward_backward(general)
    gradients = [
        torch.cat([p.main_grad.view(-1) for p in e.model[0].parameters()])
        for e in (alone, critic, actor)
    ]
    assert torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[0], gradients[2])


def test_only_the_attached_model_is_regularised() -> None:
    run_ranks(1, two_models)


# -- slime ---------------------------------------------------------------------------------------


def test_slimes_loop() -> None:
    """The hook before each step; the finalize hook is set anew in each rollout."""
    layout = Layout(dp=2, distributed_optimizer=True, targets=2)
    expect(layout, run_ranks(2, in_slime, layout, config(layout, PROBLEM)))
