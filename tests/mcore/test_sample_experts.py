"""The layer path in a mixture of experts equals a loop over samples in plain PyTorch."""

from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

import megatron_dr
from megatron_dr import DRConfig

from . import _megatron, _oracle, _samples
from ._data import Layout
from ._oracle import Parameters
from ._pairs import pairs, some
from ._ranks import run_ranks
from ._sample_check import MODES, check
from ._sample_oracle import WideOracle
from ._samples import Case

EVERY = ("exact", "ghost", "sketched", "cone", "cone ghost", "model two passes")


@pairs(EVERY, ("tokens", "microbatches"))
def test_one_rank(first: str, second: str) -> None:
    check(Layout(moe=True, per_token=second == "tokens"), MODES[first])


# Experts that see no other rank's samples.
NEAR = {
    "TP 2 SP": Layout(tp=2, sequence_parallel=True, moe=True),
    "TP 2 SP ETP 2": Layout(tp=2, etp=2, sequence_parallel=True, moe=True, per_token=True),
    "TP 2 SP EP 2": Layout(tp=2, ep=2, sequence_parallel=True, moe=True),
    "recompute TP 2 SP": Layout(
        tp=2, sequence_parallel=True, moe=True, recompute=True, per_token=True
    ),
    "PP 2": Layout(pp=2, moe=True, per_token=True),
    "CP 2": Layout(cp=2, moe=True, per_token=True),
    "DP 2": Layout(dp=2, moe=True),
    "DP 2 sharded overlap": Layout(
        dp=2, moe=True, distributed_optimizer=True, overlap=True, per_token=True
    ),
    "TP 2 SP EP 2 DP 2": Layout(tp=2, ep=2, dp=2, sequence_parallel=True, moe=True),
}
NEAR_MODES = ("cone ghost", "model two passes")


@pairs(NEAR, NEAR_MODES)
def test_layout(first: str, second: str) -> None:
    check(NEAR[first], MODES[second])


# Experts that see other ranks' samples.
WIDE = {
    "EP 2 DP 2": Layout(ep=2, dp=2, moe=True),
    "EP 2 DP 4 sharded": Layout(ep=2, dp=4, moe=True, distributed_optimizer=True, per_token=True),
    "TP 2 SP EP 4 DP 2": Layout(tp=2, ep=4, dp=2, sequence_parallel=True, moe=True, per_token=True),
    "TP 2 SP ETP 2 EP 2 DP 2": Layout(
        tp=2, etp=2, ep=2, dp=2, sequence_parallel=True, moe=True, per_token=True
    ),
    "CP 2 EP 2": Layout(cp=2, ep=2, moe=True, per_token=True),
    "PP 2 EP 2 DP 2": Layout(pp=2, ep=2, dp=2, moe=True),
}
WIDE_CASES = [(name, "cone ghost") for name in WIDE]
WIDE_CASES += [("EP 2 DP 2", "hull"), ("TP 2 SP EP 4 DP 2", "sketched")]  # hull: t's scale counts
WIDE_KEPT = ("EP 2 DP 2-hull",)


@pytest.mark.parametrize(
    ("layout", "mode"), some({f"{at}-{mode}": (at, mode) for at, mode in WIDE_CASES}, *WIDE_KEPT)
)
def test_wide(layout: str, mode: str) -> None:
    check(WIDE[layout], MODES[mode], WideOracle)


# -- auxiliary losses ------------------------------------------------------------------------------
def train_with_aux_loss(layout: Layout, initial: Parameters, case: Case | None) -> Any:
    """One step on a rank, by Megatron alone or with sample rows: pieces of the gradient."""
    _megatron.initialize(layout)
    model, optimizer, config = _megatron.build(layout, initial)
    config.moe_aux_loss_coeff, config.moe_z_loss_coeff = 0.5, 0.1
    general, target = (
        [_samples.batch(layout, role, 0, 0, n, _samples.SAMPLES) for n in range(2)]
        for role in ("general", "target")
    )
    schedule = dict(
        forward_step_func=_samples.forward_step, data_iterator=iter(general), model=model[0],
        num_microbatches=2, seq_length=_samples._data.LENGTH,
        micro_batch_size=_samples.SAMPLES, forward_only=False,
    )  # fmt: skip
    if case is None:
        get_forward_backward_func()(**schedule)
    else:
        handle = megatron_dr.attach(model, optimizer, config, DRConfig(rows="sample", **vars(case)))
        handle.step(
            get_forward_backward_func(), target_data_iterator=iter(target),
            num_target_microbatches=2, **schedule,
        )  # fmt: skip
    return _megatron.pieces(model, config, "main_grad")


def test_auxiliary_losses_belong_to_their_tokens() -> None:
    """Where every sample is kept, the update is Megatron's own, load balancing and z-loss in it."""
    layout = Layout(tp=2, sequence_parallel=True, moe=True)
    initial = _oracle.initial(layout)
    everything = Case(fraction=1.0, alpha=0.0)
    found, stock = (
        _megatron.whole(run_ranks(2, train_with_aux_loss, layout, initial, case))
        for case in (everything, None)
    )
    for name, value in stock.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


# -- what is refused -------------------------------------------------------------------------------
def attach(layout: Layout, case: Case, changes: dict[str, Any]) -> str:
    """On a rank: what `attach` refuses."""
    _megatron.initialize(layout)
    model, optimizer, config = _megatron.build(layout)
    for name, value in changes.items():
        setattr(config, name, value)
    try:
        megatron_dr.attach(model, optimizer, config, DRConfig(rows="sample", **vars(case)))
    except ValueError as error:
        return str(error)
    return ""


EP2, DEEP = Layout(ep=2, dp=2, moe=True), "moe_shared_expert_overlap"
REFUSED = {
    "layers": (EP2, Case(blocks="layer"), {}, "use --dr-blocks matrix"),
    "step": (EP2, Case(window="step"), {}, "use --dr-blocks matrix"),
    "two passes": (EP2, Case(passes=2), {}, "use --dr-blocks matrix"),
    "merged": (EP2, Case(target_pass="merged"), {}, "--dr-target-pass own"),
    "streaming": (EP2, Case(window="streaming"), {}, "--dr-window microbatch"),
    "tied over stages": (
        Layout(pp=2, ep=2, dp=2, moe=True, tied=True), Case(), {}, "tied over pipeline stages"
    ),
    "unequal": (Layout(cp=4, ep=2, moe=True), Case(), {}, "must be 1, 1 or a multiple of 4"),
    "flex": (Layout(moe=True), Case(), {"moe_token_dispatcher_type": "flex"}, "alltoall"),
    "overlap": (Layout(moe=True), Case(), {DEEP: True}, "without --moe-shared-expert-overlap"),
    "biases": (Layout(moe=True, layer_norm=True), Case(), {}, "or an expert's bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    layout, case, changes, message = REFUSED[name]
    for said in run_ranks(layout.world, attach, layout, case, changes):
        assert message in said
