"""Gradient buffers freed between steps: the memory is really free, and nothing else changes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch.multiprocessing.reductions import StorageWeakRef

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore.attach import Handle
from megatron_dr.mcore.loop import adaptor
from megatron_dr.mcore.rollouts.megatron import MegatronRollouts

from . import _megatron, _oracle, _rl, _samples
from ._data import Layout
from ._pairs import some
from ._ranks import run_ranks
from ._samples import Case

STEPS = 4


def storages(tensors: list[torch.Tensor]) -> list[StorageWeakRef]:
    return [StorageWeakRef(t.untyped_storage()) for t in tensors]


def own(handle: Any) -> list[torch.Tensor]:
    """What the plugin keeps between steps."""
    if hasattr(handle.rows, "buffers"):
        return [flat for flats in handle.rows.buffers._extra.values() for flat in flats]
    return list(handle.rows.path.targets._value.values())


def away_and_back(handle: Handle, step: int) -> None:
    """Free ours and Megatron's, in both orders; every other time our memory is left to the step."""
    kept = handle.dr.target_refresh > 1  # to the host's memory, which is this test's device
    dead, size = storages(own(handle)), sum(t.nbytes for t in own(handle))
    assert dead, "there is something to free"
    model: Any = handle.model
    if step % 2:
        for chunk in model:
            chunk.offload_grad_buffers()
    freed = handle.offload()
    assert freed == (0 if kept else size) and handle.offload() == 0
    assert kept or all(storage.expired() for storage in dead)
    for _ in range(2):
        for chunk in model:
            chunk.offload_grad_buffers()
    views = [p.main_grad for chunk in model for p in chunk.parameters()]
    buffers = [b.grad_data for chunk in model for b in chunk.buffers]
    assert all(t.untyped_storage().size() == 0 for t in (*views, *buffers))
    if step == STEPS - 1:
        handle.detach()  # while there is nothing to bind to
    for chunk in model:
        chunk.restore_grad_buffers()
    if step % 2:
        handle.restore()
        handle.restore()


def between_steps(optimizer: Any, handle: Handle, act: Callable[[Handle, int], None]) -> None:
    """Let `act` run after each optimizer step."""
    stock, steps = optimizer.step, iter(range(STEPS))

    def step() -> Any:
        result = stock()
        act(handle, next(steps))
        return result

    optimizer.step = step


def trained(layout: Layout, dr: DRConfig | Case, offloads: bool) -> list[torch.Tensor]:
    """On a rank: the parameters after some steps."""

    def plugin(model: Any, optimizer: Any, config: Any, chosen: DRConfig) -> Handle:
        handle = stock(model, optimizer, config, chosen)
        if offloads:
            between_steps(optimizer, handle, away_and_back)
        return handle

    stock = megatron_dr.attach
    if isinstance(dr, Case):
        megatron_dr.attach = plugin
        try:
            found, _ = _samples.train(layout, dr, STEPS, _oracle.initial(layout))
        finally:
            megatron_dr.attach = stock
    else:
        model, _, config, _ = _megatron.train(
            layout, STEPS, _oracle.initial(layout), lambda *rest: plugin(*rest, dr)
        )
        found = _megatron.pieces(model, config)
    values = [values.clone() for *_, values in found]
    parallel_state.destroy_model_parallel()
    return values


def cases(chosen: dict[str, Any]) -> dict[str, bool]:
    out = {}
    for name, case in chosen.items():
        never, between = (trained(*case, offloads) for offloads in (False, True))
        out[name] = all(torch.equal(a, b) for a, b in zip(never, between, strict=True))
    return out


EXACT = DRConfig(rows="slot", slots=2, set="cone", alpha=0.2, gram="exact")
SKETCH = DRConfig(rows="slot", slots=4, set="span", gram="sketch", slot_dtype="bf16")
CASES = {
    "dp2 exact": (Layout(dp=2, distributed_optimizer=True), EXACT),
    "dp2 sketch": (Layout(dp=2, distributed_optimizer=True, overlap=True,
                          overlap_param_gather=True), replace(SKETCH, slots=2)),
    "vpp2 sketch": (Layout(pp=2, vpp=2), SKETCH),
    "tp2 ghost": (Layout(tp=2, sequence_parallel=True), Case(score="ghost")),
    "dp2 cached": (Layout(dp=2), Case(score="sketched", target_refresh=2, alpha=0.0)),
}  # fmt: skip


FEW = {name: CASES[name] for name in ("dp2 exact", "dp2 cached")}


@pytest.mark.parametrize("chosen", some({"few": (FEW,), "all": (CASES,)}, "few"))
def test_memory_is_free_between_steps_and_steps_are_the_same_bit_for_bit(chosen: Any) -> None:
    for found in run_ranks(2, cases, chosen):
        assert found == dict.fromkeys(chosen, True)


# -- in Megatron's loop --------------------------------------------------------------------------
def watched(argv: list[str]) -> Any:
    """A run; in each of its rollouts, how many bytes its gradient buffers hold."""
    held, generate = [], MegatronRollouts.generate

    def watching(self: Any, *rest: Any, **kwargs: Any) -> Any:
        handle: Any = adaptor._run.handle
        buffers = [b.grad_data for chunk in handle.model for b in chunk.buffers]
        held.append(sum(t.untyped_storage().nbytes() for t in (*buffers, *own(handle))))
        return generate(self, *rest, **kwargs)

    MegatronRollouts.generate = watching
    return *_rl._run(argv), held


@pytest.mark.soak
def test_rollouts_run_without_gradient_buffers(tmp_path: Path) -> None:
    data, ended = _rl.write_prompts(tmp_path), []
    flags = f"""--dr-target-data {data["target"]} --dr-target-batch-size 4 --dr-rows slot
        --dr-slots 4 --dr-rl-valid-data {data["held_out"]} --eval-interval 3 --train-iters 5
        --data-path {data["general"]}"""
    for more in ("", "--dr-rl-offload"):
        ended += run_ranks(1, watched, f"{_rl.RL} {flags} {more}".split())
    (*plain, stayed), (*offloaded, freed) = ended
    weights, same = (_rl.parameters([found]) for found in (plain, offloaded))
    for name, value in weights.items():
        assert torch.equal(value, same[name]), name
    assert len(stayed) >= 5 and min(stayed) > 0  # two cycles of both roles, and validations
    assert freed == [0] * len(stayed)
    sentence = f"megatron_dr: {stayed[0]:,} bytes of gradient buffers on this rank are free"
    assert offloaded[1].count(sentence) == 1 and "gradient buffers" not in plain[1]
