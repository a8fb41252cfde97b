"""Several target sets: the step's target is the weighted mean of their own gradients."""

from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore.step.sets import TargetSets

from . import _data, _megatron, _oracle, _sample_check
from ._data import Layout
from ._layouts import check
from ._pairs import some
from ._problem import Problem
from ._ranks import run_ranks

ODD = (0, 0, 1)  # two sequences of the first set to one of the second
LAYOUTS = {
    "world1": Layout(targets=6, target_sets=ODD),
    "dp2-token": Layout(dp=2, targets=6, target_sets=ODD, per_token=True),
    "dp2": Layout(dp=2, target_sets=(0, 1), distributed_optimizer=True, overlap=True),
    "tp2-token": Layout(tp=2, targets=3, target_sets=ODD, per_token=True, sequence_parallel=True),
    "pp2-vpp2-token": Layout(pp=2, vpp=2, target_sets=(0, 1, 1, 1), per_token=True),
    "cp2-token": Layout(cp=2, targets=3, target_sets=ODD, per_token=True),
    "dp4-target-ranks-token": Layout(
        dp=4, target_ranks=2, targets=6, target_sets=ODD, per_token=True
    ),
    "domains": Layout(dp=2, domains=2, targets=6, target_sets=ODD, per_token=True),
    "moe-ep2-dp2": Layout(moe=True, ep=2, dp=2, targets=6, target_sets=ODD),
}


@pytest.mark.parametrize("layout", some(LAYOUTS, "dp2-token", "pp2-vpp2-token"))
def test_buffer_rows_equal_the_oracle(layout: Layout) -> None:
    check(layout, Problem(alpha=0.5))


MAXIMIN = {
    "world1": Layout(target_sets=(0, 0, 0, 1), maximin=True),
    "dp2-token": Layout(dp=2, target_sets=(0, 1), per_token=True, maximin=True,
                        distributed_optimizer=True, overlap=True),
    "pp2-vpp2-token": Layout(pp=2, vpp=2, target_sets=(0, 1, 1, 1), per_token=True, maximin=True),
    "tp2-dp2": Layout(tp=2, dp=2, target_sets=(0, 1), maximin=True, sequence_parallel=True),
    "domains": Layout(dp=2, domains=2, target_sets=(0, 1), per_token=True, maximin=True),
}  # fmt: skip


@pytest.mark.parametrize("layout", some(MAXIMIN, "dp2-token", "pp2-vpp2-token"))
def test_maximin_equals_the_oracle(layout: Layout) -> None:
    """The point between the sets' gradients that is nearest to 0."""
    check(layout, Problem(alpha=0.5))


@pytest.mark.soak
def test_maximin_has_one_mean_for_all_blocks() -> None:
    check(MAXIMIN["world1"], Problem(alpha=0.5, blocks="layer"))


SAMPLE_ROWS = {
    "DP 2 token": (Layout(dp=2, target_sets=(0, 1), per_token=True), "exact"),
    "TP 2 means": (Layout(tp=2, target_sets=(0, 1)), "step cone"),
    "PP 2 token, two passes": (
        Layout(pp=2, target_sets=(0, 1), per_token=True), "model two passes no alpha",
    ),
    "refresh": (Layout(target_sets=(0, 1), per_token=True), "refresh"),
}  # fmt: skip


@pytest.mark.parametrize("layout, mode", some(SAMPLE_ROWS, "DP 2 token"))
def test_sample_rows_equal_the_oracle(layout: Layout, mode: str) -> None:
    _sample_check.check(layout, _sample_check.MODES[mode])


def targets_alone(layout: Layout, of: list[tuple[int, ...]]) -> list[Any]:
    """On a rank: the target's gradient of a step, for each choice of its microbatches; sets where
    it has both. Routers' losses are in it."""
    stock = _megatron.transformer_config

    def with_losses(layout: Layout) -> Any:
        config = stock(layout)
        config.moe_router_load_balancing_type = "aux_loss"
        config.moe_aux_loss_coeff, config.moe_z_loss_coeff = 0.5, 0.05
        return config

    _megatron.transformer_config = with_losses
    _megatron.initialize(layout)
    model, optimizer, config = _megatron.build(layout, _oracle.initial(layout))
    handle = megatron_dr.attach(model, optimizer, config, DRConfig(set="target", norm="none"))
    found = []
    for numbers in of:
        for chunk in model:
            chunk.zero_grad_buffer()
        batches = [_data.sequence("target", 0, 0, n, layout.full_masks) for n in numbers]
        sets = tuple(int(n > 0) for n in numbers)
        both = len(set(sets)) > 1
        handle.step(
            get_forward_backward_func(), target_data_iterator=iter(batches),
            num_target_microbatches=len(batches),
            target_sets=TargetSets(("a", "b"), _data.SET_WEIGHTS, sets) if both else None,
            **_megatron.schedule(layout, model, _data.general(layout, 0, 0)),
        )  # fmt: skip
        pieces = _megatron.pieces(model, config, "main_grad")  # of the one buffer
        found.append([(*where, values.clone()) for *where, values in pieces])
    return found


@pytest.mark.parametrize("per_token", [False, True])
def test_routers_losses_are_of_their_set(per_token: bool) -> None:
    """The mean of what each set's own step has."""
    layout = Layout(moe=True, per_token=per_token)
    (found,) = run_ranks(1, targets_alone, layout, [(0,), (1, 2, 3), (0, 1, 2, 3)])
    first, second, both = (_megatron.whole([pieces]) for pieces in found)
    routers = [name for name in both if name.endswith("router.weight")]
    assert routers and all((first[name] - second[name]).norm() > 1e-3 for name in routers)
    for name, value in both.items():
        wanted = sum(w * of[name] for w, of in zip(_data.SET_WEIGHTS, (first, second), strict=True))
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6, msg=name)


WRONG = {
    "sum to 1, one of each": (("a", "b"), (0.5, 0.6), (0, 1)),
    "needs a microbatch in a step": (("a", "b"), (0.5, 0.5), (0, 0)),
}


@pytest.mark.parametrize("says", WRONG)
def test_sets_that_make_no_mean_are_refused(says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TargetSets(*WRONG[says])


def test_halves_have_as_many_of_each_set() -> None:
    alike = {(0, 1, 0, 1): True, (0, 0, 1, 1): False, (0, 1, 1): False, (0, 1, 1, 0, 1, 1): True}
    found = {of: TargetSets(("a", "b"), (0.5, 0.5), of).halves_alike for of in alike}
    assert found == alike


def test_maximin_needs_its_sets_in_turn() -> None:
    """A step whose microbatches would not fill the sets' buffers one after the other."""

    def case() -> None:
        layout = Layout(maximin=True)
        _megatron.initialize(layout)
        dials = {"targets": "maximin", "target_sets": 2}
        handle = megatron_dr.attach(*_megatron.build(layout), DRConfig(slots=4, **dials))
        call = _megatron.schedule(layout, handle.model, _data.general(layout, 0, 0))
        for of, weights in (((0, 1, 0, 1), (0.5, 0.5)), ((0, 0, 1, 1), (0.7, 0.3)), (None, None)):
            sets = None if of is None else TargetSets(("a", "b"), weights, of)
            with pytest.raises(ValueError, match="needs target_sets in each step"):
                handle.step(
                    get_forward_backward_func(), num_target_microbatches=4, target_sets=sets,
                    target_data_iterator=iter(_data.target(layout, 0, 0)), **call,
                )  # fmt: skip
        handle.detach()
        with pytest.raises(ValueError, match="how many there are: 2 or more"):
            megatron_dr.attach(
                handle.model, handle.optimizer, handle.config, DRConfig(slots=4, targets="maximin")
            )

    run_ranks(1, case)
