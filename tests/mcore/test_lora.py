"""Adapters trained in a layout equal dense adapters; what they start from; bad input."""

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

import megatron_dr
from megatron_dr.config.lora import LoRAConfig
from megatron_dr.mcore.ownership import owned_parameters

from . import _data, _lora, _megatron, _oracle, _sample_oracle, _samples
from ._data import Layout
from ._layouts import config as dr_config
from ._lora import LORA
from ._pairs import some
from ._problem import Problem
from ._ranks import run_ranks

STEPS = 3
CONE = Problem()
STOCK = Problem(set="mean", alpha=0.0, norm="none")


def run(layout: Layout, problem: Problem | None, start: Any, lora: LoRAConfig) -> Any:
    """On a rank: train adapters; their pieces, weights per step, whether the base is as it was."""
    _lora.use_adapters(lora)
    before: list[dict[str, torch.Tensor]] = []

    def attach(model: Any, optimizer: Any, config: Any) -> Any:
        before.append(_lora.frozen(model))
        if problem is not None:
            return megatron_dr.attach(model, optimizer, config, dr_config(layout, problem))
        return None

    model, _, config, log = _megatron.train(layout, STEPS, start, attach)
    after = _lora.frozen(model)
    assert before[0].keys() == after.keys() and len(after) > 10
    assert all(torch.equal(before[0][name], after[name]) for name in after)
    weights = [p.weights_BM[0].numpy() for _, p in log] if problem is not None else []
    return _megatron.pieces(model, config), weights


def check(layout: Layout, problem: Problem, attached: bool = True, lora: LoRAConfig = LORA) -> None:
    start = _lora.initial(layout, lora)
    ranks = run_ranks(layout.world, run, layout, problem if attached else None, start, lora)
    expected, history = _lora.train_densely(layout, problem, STEPS, start, lora.scale)
    for weights, dense in zip(ranks[0][1], history, strict=False):
        torch.testing.assert_close(
            torch.from_numpy(weights), torch.from_numpy(dense[""]), rtol=0, atol=2e-4
        )
    compare(expected, _megatron.whole([pieces for pieces, _ in ranks]), start)


def compare(expected: Any, found: Any, start: Any) -> None:
    """Trained adapters, by how far they moved: Adam raises fp32 noise where gradients are tiny."""
    assert found.keys() == expected.keys()  # the adapters are all that is trained
    for name, value in expected.items():
        value, begin = value.reshape(-1), start[name].double().reshape(-1)
        error = (found[name].double() - value).norm() / (value - begin).norm()
        assert error <= 2e-3, f"{name}: {error}"


LAYOUTS = {
    "world1": Layout(),
    "world1-recompute": Layout(recompute=True),
    "world1-fused-gradients": Layout(fused_gradients=True),
    "tp2": Layout(tp=2),
    "tp2-layernorm-biases": Layout(tp=2, layer_norm=True),
    "tp2-sp": Layout(tp=2, sequence_parallel=True),
    "tp2-sp-recompute": Layout(tp=2, sequence_parallel=True, recompute=True),
    "pp2-tied": Layout(pp=2, tied=True),
    "pp2-vpp2": Layout(pp=2, vpp=2),
    "dp2-distopt-overlap": Layout(
        dp=2, distributed_optimizer=True, overlap=True, overlap_param_gather=True
    ),
    "cp2": Layout(cp=2, full_masks=True),
    "tp2-pp2-sp-tied": Layout(tp=2, pp=2, sequence_parallel=True, tied=True),
}


PROJECTED = ("tp2-pp2-sp-tied", "dp2-distopt-overlap", "cp2", "pp2-vpp2")


@pytest.mark.parametrize("layout", some(LAYOUTS, *PROJECTED))
def test_projected_training_equals_dense_adapters(layout: Layout) -> None:
    check(layout, CONE)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sequence_parallel=True)])
def test_training_without_the_plugin_equals_dense_adapters(layout: Layout) -> None:
    check(layout, STOCK, attached=False)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2, vpp=2)])
def test_sketches_are_of_elements_of_the_whole_adapters(layout: Layout) -> None:
    """Weights from sketches hashed by global names and indices: as the dense sketches give."""
    check(layout, Problem(gram="sketch"))


@pytest.mark.soak
def test_adapters_on_the_attention_of_a_mixture_of_experts() -> None:
    layout = Layout(moe=True, tp=2, sequence_parallel=True, ep=2)
    check(layout, CONE, lora=LoRAConfig(rank=2, alpha=3.0, targets=("linear_qkv", "linear_proj")))


def test_one_of_a_ranks_model_chunks_may_have_no_adapters() -> None:
    check(Layout(pp=2, vpp=2), CONE, lora=LoRAConfig(rank=4, targets=r"layers\.[01]\..*"))


def biases_of_experts(layout: Layout) -> list[bool]:
    """On a rank: whether Megatron leaves each router's expert biases as they are."""
    _megatron.initialize(layout)
    _lora.use_adapters(LoRAConfig(targets="linear_qkv"))
    model, _, _ = _megatron.build(layout, _oracle.initial(layout))
    return [m.frozen_expert_bias for m in model[0].modules() if hasattr(m, "frozen_expert_bias")]


def test_biases_of_experts_are_frozen_too() -> None:
    assert run_ranks(1, biases_of_experts, Layout(moe=True)) == [[True] * 4]


def train_by_samples(layout: Layout, case: _samples.Case, start: Any) -> Any:
    """On a rank: pieces of adapters that sample rows trained."""
    _lora.use_adapters()
    return _samples.train(layout, case, 2, start)[0]


@pytest.mark.parametrize(
    "layout, case",
    [
        (Layout(tp=2, sequence_parallel=True), _samples.Case(score="ghost")),
        (Layout(recompute=True, per_token=True), _samples.Case(set="cone", norm="general")),
    ],
    ids=["tp2-sp-ghost", "recompute-cone"],
)
def test_sample_rows_are_of_adapters_alone(
    layout: Layout, case: _samples.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer path's oracle, its model made of effective weights."""
    start = _lora.initial(layout)
    ranks = run_ranks(layout.world, train_by_samples, layout, case, start)
    base, adapters = _lora.split(start)
    base, stock = {name: value.double() for name, value in base.items()}, _oracle.token_losses
    weights = lambda p: _lora.effective(base, p, LORA.scale)  # noqa: E731
    monkeypatch.setattr(_oracle, "initial", lambda layout: adapters)
    monkeypatch.setattr(_oracle, "token_losses", lambda p, *rest: stock(weights(p), *rest))
    compare(_sample_oracle.oracle(layout, case, 2)[0], _megatron.whole(ranks), start)


# -- initial values, step 0, dropout -------------------------------------------------------------
def first_gradients(layout: Layout, start: Any, lora: LoRAConfig) -> Any:
    """On a rank: pieces of the adapters and of their gradients after no step and one backward."""
    _lora.use_adapters(lora)
    _megatron.initialize(layout)
    model, _, config = _megatron.build(layout, start)
    values = _megatron.pieces(model, config)
    rank = parallel_state.get_data_parallel_rank()
    kwargs = _megatron.schedule(layout, model, _data.general(layout, 0, rank))
    _megatron.get_forward_backward_func()(**kwargs)
    return values, _megatron.pieces(model, config, "main_grad")


def first(layout: Layout, start: Any, lora: LoRAConfig = LORA) -> Any:
    ranks = run_ranks(layout.world, first_gradients, layout, start, lora)
    return [_megatron.whole([rank[n] for rank in ranks]) for n in (0, 1)]


SHARDED = {
    "tp2": Layout(tp=2),
    "tp2-sp": Layout(tp=2, sequence_parallel=True),
    "pp2-vpp2": Layout(pp=2, vpp=2),
}


@pytest.mark.parametrize("layout", SHARDED.values(), ids=SHARDED.keys())
def test_initial_values_do_not_depend_on_the_layout(layout: Layout) -> None:
    one, _ = first(Layout(), _oracle.initial(Layout()))
    other, _ = first(layout, _oracle.initial(layout))
    assert one.keys() == other.keys() and len(one) == 2 * len(_lora.linear(layout))
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
        if "lora_b" in name:
            assert not value.any()
        else:  # uniform in +-1/sqrt(in)
            bound = (value.numel() // LORA.rank) ** -0.5
            assert 0.8 * bound < value.abs().max() <= bound
    seeded, _ = first(Layout(), _oracle.initial(Layout()), LoRAConfig(rank=4, seed=1))
    name = "decoder.layers.0.mlp.linear_fc1.lora_a.weight"
    assert not torch.equal(seeded[name], one[name])
    assert not torch.equal(one[name], one[name.replace("s.0", "s.1")])


def projected_gradients(layout: Layout, steps: int, dr: dict[str, Any], start: Any) -> Any:
    """On a rank: whether all weights are finite, and pieces of the last step's gradient."""
    _lora.use_adapters()
    configuration = dr_config(layout, Problem(blocks="matrix", **dr))
    model, _, config, log = _megatron.train(
        layout, steps, start, lambda m, o, c: megatron_dr.attach(m, o, c, configuration)
    )
    finite = all(bool(p.weights_BM.isfinite().all()) for _, p in log)
    return finite, _megatron.pieces(model, config, "main_grad")


@pytest.mark.parametrize("chosen", ["cone", "hull", "topk"])
def test_a_waits_for_b_at_step_0(chosen: str) -> None:
    """B = 0: A's rows are zero, whatever the weights; from step 1 on both have a gradient."""
    layout = Layout()
    for steps in (1, 2):
        ((finite, pieces),) = run_ranks(
            1, projected_gradients, layout, steps, {"set": chosen}, _oracle.initial(layout)
        )
        assert finite
        for name, gradient in _megatron.whole([pieces]).items():
            assert gradient.any() == (steps == 2 or "lora_b" in name), name


def slope(layout: Layout, start: Any) -> dict[str, tuple[float, float]]:
    """On a rank: |g|^2 of all A's, and of all B's, and the slope of the loss along g.

    g is the gradient with dropout; all losses are taken with the same masks.
    """
    _lora.use_adapters(LoRAConfig(rank=4, alpha=6.0, dropout=0.5))
    _megatron.initialize(layout)
    model, _, config = _megatron.build(layout, start)
    tracker, batches = get_cuda_rng_tracker(), _data.general(layout, 0, 0)
    states = torch.get_rng_state(), tracker.get_states()

    def loss(**more: Any) -> float:
        torch.set_rng_state(states[0])
        tracker.set_states(dict(states[1]))  # which it changes
        kwargs = {**_megatron.schedule(layout, model, batches), **more}
        reports = _megatron.get_forward_backward_func()(**kwargs)
        return sum(float(r["lm loss"][0] / r["lm loss"][1]) for r in reports) / len(reports)

    assert loss() == loss(forward_only=True)
    out = {}
    for matrix in ("lora_a", "lora_b"):
        parameters = [o.parameter for o in owned_parameters(model, config) if matrix in o.name]
        square = sum(p.main_grad.square().sum() for p in parameters)
        torch.distributed.all_reduce(square)  # every element is on one rank
        values = []
        for step in (1e-2, -1e-2):
            saved = [p.data.clone() for p in parameters]
            for p in parameters:
                p.data.add_(p.main_grad, alpha=step / float(square.sqrt()))
            values.append(loss(forward_only=True))
            for p, value in zip(parameters, saved, strict=True):
                p.data.copy_(value)
        out[matrix] = float(square.sqrt()), (values[0] - values[1]) / 2e-2
    return out


@pytest.mark.parametrize(
    "layout",
    some(
        {"tp2-recompute": Layout(tp=2, recompute=True),
         "tp2-sp": Layout(tp=2, sequence_parallel=True)}, "tp2-recompute",
    ),
)  # fmt: skip
def test_gradients_are_those_of_the_function_with_dropout(layout: Layout) -> None:
    """The loss falls along the gradient as fast as the gradient is long: by central differences."""
    for rank in run_ranks(layout.world, slope, layout, _lora.initial(layout)):
        for matrix, (length, found) in rank.items():
            assert found == pytest.approx(length, rel=0.01), matrix


# -- bad input -----------------------------------------------------------------------------------
def refused(layout: Layout, lora: LoRAConfig) -> str:
    _megatron.initialize(layout)
    _lora.use_adapters(lora)
    with pytest.raises(ValueError) as error:
        _megatron.build(layout, _oracle.initial(layout))
    return str(error.value)


BAD = {
    "no match": (
        Layout(),
        {"targets": ("q_proj", "v_proj")},
        "targets 'q_proj|v_proj' match none of the model's layers, whose names end in linear_fc1, "
        "linear_fc2, linear_proj, linear_qkv",
    ),
    "stage": (
        Layout(pp=2),
        {"targets": r"layers\.[01]\..*"},
        r"match nothing on the pipeline stage of rank 1",
    ),
    "rank": (Layout(tp=2), {"rank": 3}, "rank 3 must be a multiple of the tensor-parallel size 2"),
    "experts": (Layout(moe=True), {}, "does not adapt experts, but the targets"),
    "router": (Layout(moe=True), {"targets": "router"}, "mlp.router is a TopKRouter"),
}


@pytest.mark.parametrize("layout, changes, message", BAD.values(), ids=BAD.keys())
def test_bad_targets_are_one_sentence_on_every_rank(
    layout: Layout, changes: dict[str, Any], message: str
) -> None:
    said = run_ranks(layout.world, refused, layout, LoRAConfig(**changes))
    assert all(message in sentence for sentence in said), said
    assert len(set(said)) == 1
