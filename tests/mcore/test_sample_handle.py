"""Sample rows: what holds beside equality with the oracle."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore.layer_rows import weigh
from megatron_dr.mcore.layer_rows.targets import Targets

from . import _data, _megatron, _oracle, _samples
from ._data import Layout
from ._ranks import run_ranks
from ._sample_check import MODES, check
from ._samples import Case

ONE = Layout(per_token=True)


def joined(parts: list[dict]) -> dict:
    return {key: torch.cat([p[key] for p in parts]) for key in parts[0]}


def gradients(layout: Layout, case: Case, together: bool, plugin: bool = True) -> Any:
    """The step's gradients; general samples in two microbatches, or in one of twice the size."""
    _megatron.initialize(layout)
    model, optimizer, config = _megatron.build(layout, _oracle.initial(layout))
    handle = megatron_dr.attach(model, optimizer, config, DRConfig(rows="sample", **vars(case)))
    if not plugin:
        handle.detach()
    parts = [_samples.batch(layout, "general", 0, 0, n, 3) for n in range(2)]
    general = [joined(parts)] if together else parts
    target = [_samples.batch(layout, "target", 0, 0, 0, 2)]
    schedule = {
        "forward_step_func": _samples.forward_step, "data_iterator": iter(general),
        "model": model[0], "num_microbatches": len(general), "seq_length": _data.LENGTH,
        "micro_batch_size": len(general[0]["tokens"]), "forward_only": False,
    }  # fmt: skip
    model[0].zero_grad_buffer()
    if plugin:
        handle.step(
            get_forward_backward_func(), target_data_iterator=iter(target),
            num_target_microbatches=0 if case.set == "mean" else 1, target_micro_batch_size=2,
            **schedule,
        )  # fmt: skip
    else:
        get_forward_backward_func()(**schedule)
    named = model[0].module.named_parameters()
    return {name: p.main_grad.clone() for name, p in named}


def compare(one: dict, other: dict, tolerance: float) -> None:
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance * 0.1)


@pytest.mark.parametrize("passes", (1, 2))
@pytest.mark.parametrize(
    "dials",
    [
        {"set": "topk", "norm": "tokens"},
        {"set": "cone", "norm": "general"},
        {"set": "filter", "norm": "tokens", "score": "ghost"},
    ],
)
def test_accumulation_equals_one_larger_batch(dials: dict[str, Any], passes: int) -> None:
    case = Case(window="step", passes=passes, **dials)
    one, two = (run_ranks(1, gradients, ONE, case, together)[0] for together in (True, False))
    compare(one, two, 1e-5)


@pytest.mark.parametrize("fused", (False, True))
def test_off_and_detached_are_megatrons_own_bit_for_bit(fused: bool) -> None:
    layout = Layout(per_token=True, fused_gradients=fused, layer_norm=True)
    off = Case(set="mean", alpha=0.0, norm="none")
    found = [run_ranks(1, gradients, layout, off, False, plugin)[0] for plugin in (True, False)]
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
        assert value.abs().sum() > 0


def trained(layout: Layout, case: Case) -> Any:
    torch.manual_seed(5)
    return _samples.train(layout, case, 2, _oracle.initial(layout))[0]


@pytest.mark.parametrize("layout", [ONE, Layout(pp=2, vpp=2)], ids=("one", "PP 2 VPP 2"))
def test_a_second_pass_drops_out_what_was_scored(layout: Layout) -> None:
    """Also where it leaves the target out: the first pass began with the target's microbatches."""
    layout = replace(layout, dropout=0.2)
    one, two = (
        _megatron.whole(
            run_ranks(layout.world, trained, layout, Case(blocks="model", alpha=0.0, passes=passes))
        )
        for passes in (1, 2)
    )
    compare(one, two, 1e-5)
    if layout.world == 1:
        case = Case(blocks="model", alpha=0.0)
        without = _megatron.whole(run_ranks(1, trained, replace(layout, dropout=0.0), case))
        assert any(float((one[name] - without[name]).abs().max()) > 1e-3 for name in one)


def test_a_stage_without_parameters_knows_that_there_is_a_target() -> None:
    """With a target that is kept for two steps: every rank runs as many microbatches."""
    case = Case(target_refresh=2, alpha=0.0)
    one, two = (
        _megatron.whole(run_ranks(layout.world, trained, layout, case))
        for layout in (Layout(frozen=(0, 1)), Layout(frozen=(0, 1), pp=2))
    )
    assert one and not any("layers.0." in name for name in one)
    compare(one, two, 1e-5)


@pytest.mark.parametrize("mode", ("exact", "merged"))
def test_samples_whose_number_is_known_beforehand(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, which is not asked how many samples are chosen."""
    monkeypatch.setattr(weigh, "_can_ask", lambda values: False)
    check(ONE, MODES[mode])


def test_everything_chosen_is_the_plain_gradient() -> None:
    """f = 1 keeps every sample: Megatron's gradient up to rounding of the scale."""
    every = run_ranks(1, gradients, ONE, Case(fraction=1.0, alpha=0.0), False)[0]
    plain = run_ranks(1, gradients, ONE, Case(set="mean", alpha=0.0, norm="none"), False)[0]
    compare(every, plain, 1e-6)


def test_an_empty_choice_gives_no_gradient_to_any_parameter() -> None:
    """The target opposes every sample: filter(1) keeps none, and norms get none either."""

    def opposed() -> Any:
        layout, case = ONE, Case(set="filter", fraction=1.0, alpha=0.0, blocks="model")
        _megatron.initialize(layout)
        model, optimizer, config = _megatron.build(layout, _oracle.initial(layout))
        handle = megatron_dr.attach(model, optimizer, config, DRConfig(rows="sample", **vars(case)))
        Targets.of = lambda self, place: -self._value[place.number]  # type: ignore[method-assign]
        batch = _samples.batch(layout, "general", 0, 0, 0, 1)
        model[0].zero_grad_buffer()
        handle.step(
            get_forward_backward_func(), forward_step_func=_samples.forward_step,
            data_iterator=iter([batch]), model=model[0], num_microbatches=1,
            seq_length=_data.LENGTH, micro_batch_size=1, num_target_microbatches=1,
            target_data_iterator=iter([batch]),
        )  # fmt: skip
        return {n: p.main_grad.clone() for n, p in model[0].module.named_parameters()}

    found = run_ranks(1, opposed)[0]
    assert all(float(g.abs().max()) == 0.0 for g in found.values())


def refusal(layout: Layout, dials: dict[str, Any]) -> str:
    _megatron.initialize(layout)
    model, optimizer, config = _megatron.build(layout, _oracle.initial(layout))
    try:
        megatron_dr.attach(model, optimizer, config, DRConfig(rows="sample", **dials))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "layout, dials, words",
    [
        (Layout(pp=2, tied=True), {"score": "ghost"}, "an embedding that is tied over 2 pipeline"),
        (ONE, {"score": "ghost", "window": "step"}, "--dr-score sketched or exact"),
        (
            Layout(pp=2, tied=True),
            {"window": "streaming", "set": "topk", "blocks": "matrix"},
            "use --dr-window microbatch",
        ),
    ],
)
def test_refused_on_every_rank(layout: Layout, dials: dict[str, Any], words: str) -> None:
    for sentence in run_ranks(layout.world, refusal, layout, dials):
        assert words in sentence


def test_a_parameter_of_an_unknown_layer_is_named() -> None:
    def attach() -> str:
        _megatron.initialize(ONE)
        model, optimizer, config = _megatron.build(ONE)
        model[0].module.extra = torch.nn.Linear(2, 2)
        try:
            megatron_dr.attach(model, optimizer, config, DRConfig(rows="sample"))
        except ValueError as error:
            assert "forward" not in model[0].module.decoder.final_layernorm.__dict__
            return str(error)
        return ""

    assert "can't observe extra.weight" in run_ranks(1, attach)[0]


def test_bad_batches_are_refused() -> None:
    def step(change: str) -> str:
        _megatron.initialize(ONE)
        model, optimizer, config = _megatron.build(ONE)
        dr = DRConfig(rows="sample", set="topk", target_pass="merged")
        handle = megatron_dr.attach(model, optimizer, config, dr)
        batches = [_samples.batch(ONE, "general", 0, 0, n, 3) for n in range(2)]
        if change == "mask":
            del batches[1]["loss_mask"]
        try:
            handle.step(
                get_forward_backward_func(), forward_step_func=_samples.forward_step,
                data_iterator=iter(batches), model=model[0], num_microbatches=2,
                seq_length=_data.LENGTH, micro_batch_size=4 if change == "size" else 3,
                num_target_microbatches=1 if change == "number" else 2,
                target_data_iterator=iter(batches),
            )  # fmt: skip
        except ValueError as error:
            return str(error)
        return ""

    words = {"mask": "with 'loss_mask'", "size": "4 samples are expected", "number": "as many"}
    for change, expected in words.items():
        assert expected in run_ranks(1, step, change)[0]
