"""RL systems that call Megatron's schedules themselves: the adapters in their order of calls.

Loops here are in the shape of each host's (`_hosts`). test_hosts_installed.py runs the hosts' own.
"""

import contextlib
import dataclasses
import io
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_dr import DRConfig
from megatron_dr.mcore import hosts
from megatron_dr.mcore.hosts import slime, state, verl

from . import _data, _megatron, _slime
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
     DRConfig(rows="rank", target_ranks=1)],
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


# -- state ---------------------------------------------------------------------------------------
CHOSEN = DRConfig(
    rows="slot", slots=4, gram="sketch", sketch_size=64, alpha_style="auto", alpha_steps=9,
    target_size=12,
)  # fmt: skip


def trained(folder: Path, kind: str) -> tuple[list[float], list[torch.Tensor]]:
    """Three steps of a host: at once, or with a checkpoint after the first one. What alpha was, and
    the parameters."""
    layout = Layout(targets=2)
    engine = Engine(layout, summed=False)
    handle = hosts.attach(engine.model, engine.optimizer, CHOSEN)
    alphas = []
    for step in range(3):
        target = _data.target(layout, step, 0)

        def run_target(target: Any = target) -> None:
            training.samples = hosts.of_data_ranks(3)  # one of its microbatches has two samples
            engine.forward_backward(target)

        if step == 1 and kind != "at once":
            if kind == "resumed":
                state.save(handle, folder)
            handle.detach()
            handle = hosts.attach(engine.model, engine.optimizer, CHOSEN)
            assert state.load(handle, folder) == (kind == "resumed")
        with hosts.regularised(handle, run_target) as training:
            engine.zero_grad()
            engine.forward_backward(_data.general(layout, step, 0))
            engine.optimizer.step()
        handle.offload()  # as verl does between two steps
        alphas.append(float(handle.metrics["dr alpha"]))
        assert handle.metrics["dr E"] == pytest.approx(9 * 3 / 12)
    return alphas, [p.detach().clone() for p in engine.model[0].parameters()]


def stopped(folder: Path) -> None:
    _megatron.initialize(Layout())
    left_alone, resumed = trained(folder, "at once"), trained(folder, "resumed")
    assert left_alone[0] == resumed[0]
    assert all(torch.equal(a, b) for a, b in zip(left_alone[1], resumed[1], strict=True))
    (folder / state.FILE).unlink()
    anew = trained(folder, "anew")
    assert not all(torch.equal(a, b) for a, b in zip(left_alone[1], anew[1], strict=True))


def test_a_host_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """The sketches' seeds and what alpha's rule has gathered: bit for bit as if never stopped."""
    run_ranks(1, stopped, tmp_path)


def damaged(folder: Path) -> None:
    engine = one_engine()
    handle = hosts.attach(engine.model, engine.optimizer, CHOSEN)
    for text in ("", "{", "[]", '{"steps": 3}', '{"steps": "3", "averages": null}'):
        if torch.distributed.get_rank() == 0:
            (folder / state.FILE).write_text(text)
        torch.distributed.barrier()
        with pytest.raises(ValueError, match="is not what megatron_dr wrote"):
            state.load(handle, folder)
        assert handle.steps == 0
        torch.distributed.barrier()


def test_a_damaged_state_is_refused_on_every_rank(tmp_path: Path) -> None:
    run_ranks(2, damaged, tmp_path)


def with_other_settings(folder: Path) -> None:
    engine = one_engine()
    handle = hosts.attach(engine.model, engine.optimizer, CHOSEN)
    state.save(handle, folder)
    handle.detach()
    handle = hosts.attach(
        engine.model, engine.optimizer, dataclasses.replace(CHOSEN, set="span", ridge=0.1)
    )
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        state.load(handle, folder)
    assert "other settings: set 'span' (was 'cone'), ridge 0.1 (was 0.3)" in said.getvalue()


def test_other_settings_are_said(tmp_path: Path) -> None:
    run_ranks(1, with_other_settings, tmp_path)


# -- slime ---------------------------------------------------------------------------------------


def test_slimes_loop() -> None:
    """The hook before each step; the finalize hook is set anew in each rollout."""
    pytest.importorskip(
        "megatron.training", exc_type=ImportError
    )  # slime's Megatron has it, the wheel of 0.16 doesn't
    layout = Layout(dp=2, distributed_optimizer=True, targets=2)
    expect(layout, run_ranks(2, in_slime, layout, config(layout, PROBLEM)))


def in_a_resumed_slime(folder: Path, saved: bool) -> None:
    """Megatron's checkpoint of the arguments, as slime writes it after steps of ours."""
    from megatron_dr.mcore.hosts import slime

    engine = one_engine()
    handle = hosts.attach(engine.model, engine.optimizer, CHOSEN)
    handle.steps = 7
    args = _slime.arguments("")
    if saved:
        args.megatron_dr = state.packed(handle)
    (folder / "iter_0000003").mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    dist_checkpointing.save({"args": args}, str(folder / "iter_0000003"))
    handle.steps, args.load = 0, str(folder)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        slime._load(handle, args)
    assert handle.steps == (7 if saved else 0)
    assert ("was saved without megatron_dr" in said.getvalue()) is not saved


@pytest.mark.parametrize("saved", [True, False])
def test_slime_goes_on_from_its_checkpoint(tmp_path: Path, saved: bool) -> None:
    pytest.importorskip("megatron.training", exc_type=ImportError)  # as above
    run_ranks(1, in_a_resumed_slime, tmp_path, saved)


@pytest.mark.parametrize("config, says", [
    (Namespace(router_replay=Namespace(mode="R3")), "verl's router replay"),
    (Namespace(dynamic_context_parallel=True), "verl's dynamic_context_parallel"),
])  # fmt: skip
def test_what_verls_engine_is_not_to_have(config: Namespace, says: str) -> None:
    usual = {"router_replay": Namespace(mode="disabled"), "dynamic_context_parallel": False}
    verl._check(Namespace(**usual))
    with pytest.raises(ValueError, match=says):
        verl._check(Namespace(**{**usual, **vars(config)}))


def test_slime_replays_no_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable that its loop reads; before anything of a step is made."""
    monkeypatch.setenv("ENABLE_ROUTING_REPLAY", "1")
    hook = slime.before_train_step(DRConfig(), lambda *_: {})
    model = [torch.nn.Linear(1, 1)]
    with pytest.raises(ValueError, match="slime's router replay"):
        hook(Namespace(), 0, 0, model, None, None)
