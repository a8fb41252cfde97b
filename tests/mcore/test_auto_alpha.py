"""The rule `auto` gathers and chooses what dense rows and halves say, in every layout."""

import contextlib
import io
from typing import Any

import pytest
import torch

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore.step.alpha import Alpha
from megatron_dr.projection import Cone, rule

from . import _megatron, _oracle, _problem
from ._data import Layout
from ._ranks import run_ranks

SIZE = 16  # samples of the target set, of which 4 are in a step
STEPS = 4  # of the run
RATES = [0.5, 1.0, 1.0, 0.25]
PASSES = 2.75 * 4 / SIZE
LAYOUTS = {
    "buffers": Layout(),
    "buffers-tp2-token": Layout(tp=2, per_token=True, full_masks=True),
    "buffers-token-other-numbers": Layout(per_token=True),
    "groups": Layout(dp=2),
    "groups-instances": Layout(dp=2, distributed_optimizer=True, instances=2),
    "groups-pp2-distopt": Layout(dp=2, pp=2, distributed_optimizer=True),
    "domains": Layout(dp=2, domains=2),
    "buffers-two-sets-token": Layout(target_sets=(0, 1), per_token=True),
}
LOSS_SCALE = 1024.0


def found(
    layout: Layout, initial: Any, blocks: str, scale: float
) -> tuple[list[float], list[float]]:
    """What the first step logged, and the averages that it gathered."""
    names = tuple(f"corpus {d}" for d in range(layout.domains))
    rows: dict[str, Any] = {"slots": layout.slots}
    if names:
        rows = {"rows": "domain", "domains": names}
    dr = DRConfig(
        alpha_style="auto", target_size=SIZE, alpha_steps=STEPS, gram="exact", blocks=blocks,  # type: ignore[arg-type]
        keep_general=0.3, **rows,
    )  # fmt: skip
    handles: list[Any] = []

    def attach(model: Any, optimizer: Any, config: Any) -> Any:
        config.grad_scale_func = lambda loss: scale * loss  # as with fp16
        handles.append(megatron_dr.attach(model, optimizer, config, dr))
        handles[0].dial.rates = RATES
        return handles[0]

    _megatron.train(layout, 1, initial, attach)
    values = handles[0].metrics
    named = [float(values[f"dr {name}"]) for name in ("alpha", "beta", "r", "D", "G", "m", "E")]
    return named, handles[0].state_dict()["dial"]["averages"].tolist()


def expected(layout: Layout, initial: Any, blocks: str) -> tuple[list[float], list[float]]:
    """From dense gradients in one process."""
    parameters = {k: v.double().requires_grad_() for k, v in initial.items()}
    general, target = _oracle.rows(layout, parameters, 0)
    error = {name: torch.zeros_like(value) for name, value in target.items()}
    for weight, sequences in _oracle.target_sets(layout, _oracle.targets(layout, 0)):
        tokens = _oracle._tokens(sequences, layout)  # a half has its tokens' part in t, doubled
        middle = len(sequences) // 2
        a, b = (
            _oracle._gradient(parameters, half, None if tokens is None else tokens / 2)
            for half in (sequences[:middle], sequences[middle:])
        )
        for name, value in error.items():
            value += weight * (a[name] - b[name]) / 2
    grams = []
    for members in _problem.blocks(blocks, target).values():
        flat = lambda g: torch.cat([g[name].reshape(-1) for name in members])  # noqa: B023, E731
        rows = torch.stack([flat(g) for g in (*general, target, error)])
        grams.append(rows @ rows.T)
    seen = rule.seen(Cone(0.3), "general", torch.stack(grams))
    state = rule.gathered(None, seen)
    choice = rule.chosen(state, seen, PASSES, 0.3)
    state = rule.worn(state, choice, seen, 4 / SIZE * RATES[0])
    named = (*rule.shares(choice, seen), choice.r, choice.D, choice.G, choice.m, PASSES)
    return [float(x) for x in named], state.tolist()


@pytest.mark.parametrize("blocks", ["model", "layer"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_what_is_chosen_is_of_the_dense_rows(layout: Layout, blocks: str) -> None:
    """A checkpoint keeps pure numbers, whatever Megatron divides and multiplies by."""
    initial = _oracle.initial(layout)
    each = run_ranks(layout.world, found, layout, initial, blocks, LOSS_SCALE)
    assert all(one == each[0] for one in each)  # bit for bit
    named, averages = expected(layout, initial, blocks)
    assert each[0][0] == pytest.approx(named, rel=1e-3, abs=1e-5)
    assert each[0][1] == pytest.approx(averages, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, per_token=True, full_masks=True)])
def test_the_loss_scale_is_in_nothing_that_is_kept(layout: Layout) -> None:
    """A power of two: the same bits."""
    initial = _oracle.initial(layout)
    one, other = (
        run_ranks(layout.world, found, layout, initial, "model", scale)[0] for scale in (1.0, 64.0)
    )
    assert one == other


NO_HALVES = {
    "one rank": Layout(targets=1),
    "pp2": Layout(targets=1, pp=2),
    "a row of ranks": Layout(
        dp=2, row_ranks=2, targets=2, distributed_optimizer=True, overlap=True
    ),
}


def ended(layout: Layout, initial: Any, dials: dict[str, Any]) -> tuple[Any, Any]:
    """On a rank: what the last step logged, and the parameters."""
    dr = DRConfig(gram="exact", slots=layout.slots, row_ranks=layout.row_ranks, **dials)
    handles: list[Any] = []

    def attach(model: Any, optimizer: Any, config: Any) -> Any:
        handles.append(megatron_dr.attach(model, optimizer, config, dr))
        return handles[0]

    model, *_ = _megatron.train(layout, 2, initial, attach)
    values = {name: float(value) for name, value in handles[0].metrics.items()}
    return values, {n: p.detach().clone() for c in model for n, p in c.named_parameters()}


@pytest.mark.parametrize("layout", NO_HALVES.values(), ids=NO_HALVES.keys())
def test_a_target_of_one_microbatch_is_projected_as_with_a_constant(layout: Layout) -> None:
    """It fills one of two buffers; the other has no part in anything."""
    initial = _oracle.initial(layout)
    dials = {"alpha_style": "auto", "target_size": SIZE, "alpha_steps": STEPS}
    auto = run_ranks(layout.world, ended, layout, initial, dials)
    constant = run_ranks(layout.world, ended, layout, initial, {"alpha": auto[0][0]["dr alpha"]})
    for found, wanted in zip(auto, constant, strict=True):
        for name in ("dr cos general", "dr cos update", "dr residual", "dr rows"):
            assert found[0][name] == pytest.approx(wanted[0][name], rel=1e-5), name
        for name, parameter in wanted[1].items():
            torch.testing.assert_close(found[1][name], parameter, rtol=1e-5, atol=1e-6)


def test_target_set_size_is_needed() -> None:
    def attach() -> str:
        dr = DRConfig(alpha_style="auto", alpha_steps=STEPS, slots=4)
        try:
            _megatron.train(Layout(), 1, None, lambda m, o, c: megatron_dr.attach(m, o, c, dr))
        except ValueError as error:
            return str(error)
        return ""

    assert "needs target_size" in run_ranks(1, attach)[0]


DR = DRConfig(alpha_style="auto", target_size=SIZE, alpha_steps=STEPS, slots=4)
GRAM = torch.eye(6, dtype=torch.float64)[None] + 0.5


def told(state: Any, step: int) -> tuple[dict[str, float], list[float], str]:
    """What a rule says of a step after it has loaded a state."""
    dial, out = Alpha(DR), io.StringIO()
    dial.load(state)
    with contextlib.redirect_stdout(out):
        shares = dial.shares(step, 4, GRAM)
    assert dial.averages is not None
    return {k: float(v) for k, v in shares.log.items()}, dial.averages.tolist(), out.getvalue()


def test_states_of_others_count_as_none() -> None:
    """Of an older rule with a sentence; none of them as new: the target may be worn."""
    states = (
        {"statistics": torch.rand(4)},
        torch.rand(4),
        [0.5, 0.5],
        None,
        {"averages": torch.rand(8)},
    )
    first, *others = [run_ranks(1, told, state, 3)[0] for state in states]
    for values, averages, said in others:
        assert (values, averages) == first[:2]
        assert averages[7] == 0 and averages[8] > 1  # m is its prior, and the first pass is over
        assert "all steps counted alike, as no learning rates were given" in said
    assert ["older rule" in said for *_, said in (first, *others)] == [
        True,
        True,
        False,
        False,
        True,
    ]
    values, averages, _ = run_ranks(1, told, {"averages": torch.tensor(first[1])}, 4)[0]
    assert averages[0] == pytest.approx(0.95 * 0.05 + 0.05)
