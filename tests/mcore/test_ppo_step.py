"""PPO's steps on a Megatron model with a value head, against plain loops in float64."""

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.optimizer import (
    OptimizerConfig,
    _get_param_groups,
    get_standard_config_overrides,
)

from megatron_dr.config.dr import DRConfig

from . import _megatron
from ._data import Layout
from ._oracle import Parameters
from ._ppo_step import (
    BY_POLICY,
    GENERAL,
    HEAD,
    ROWS,
    STEPS,
    expected,
    gradient,
    initial,
    predictions,
    train,
    with_head,
)
from ._problem import Problem
from ._ranks import run_ranks

_SP = {"tp": 2, "sequence_parallel": True}
TWO = {
    "dp2": Layout(dp=2), "dp2 sharded": Layout(dp=2, distributed_optimizer=True),
    "tp2": Layout(tp=2), "tp2 sp": Layout(**_SP), "pp2": Layout(pp=2),
    "pp2 vpp2 sharded": Layout(pp=2, vpp=2, distributed_optimizer=True),
}  # fmt: skip
PROBLEM = Problem(set="cone", blocks="model", alpha=0.1)
DR = DRConfig(set="cone", blocks="model", alpha=0.1, ridge=PROBLEM.ridge, gram="exact")


def layouts(chosen: dict[str, Layout]) -> dict[str, Any]:
    with_head()
    out = {}
    for name, layout in chosen.items():
        dr = dataclasses.replace(DR, slots=len(ROWS) // layout.dp)
        out[name] = train(dataclasses.replace(layout, per_token=True), dr, STEPS)
    return out


def test_steps_are_those_of_plain_loops_in_every_layout() -> None:
    weights, updates, logged = expected(PROBLEM)
    trees = [run_ranks(1, layouts, {"one": Layout()}), run_ranks(2, layouts, TWO)]
    log_prob, value = predictions({k: v.double() for k, v in initial().items()}, GENERAL.tokens_NT)
    both = torch.stack([log_prob, value], -1) * GENERAL.mask_NT[..., None]
    for name, found in [(n, [rank[n] for rank in ranks]) for ranks in trees for n in ranks[0]]:
        for predicted, *_ in found:
            torch.testing.assert_close(
                predicted[:, 1:].double(), both[:, :-1], rtol=1e-4, atol=1e-5, msg=name
            )
        if not name.endswith("sharded"):  # else a rank has only its shard of the reduced gradient
            close(_megatron.whole([g for _, _, g, _ in found]), updates[0], 1e-3, 3e-6, name)
        close(_megatron.whole([p for *_, p in found]), weights, 1e-3, 1e-4, name)
        for key, wanted in logged.items():
            pairs = [r[key] for _, reports, _, _ in found for r in reports]
            total, count = sum(pairs) if pairs else (0, 0)
            assert float(total / count) == pytest.approx(wanted, rel=1e-3), (name, key)


def close(found: Parameters, wanted: Parameters, rtol: float, atol: float, where: str) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value.reshape(-1).float(), rtol=rtol, atol=atol, msg=f"{where}: {name}"
        )


def by_token(chosen: dict[str, Layout]) -> dict[str, Any]:
    """On a rank: the gradient of a step that is the target's alone, of its loss `token-pg`."""
    with_head()
    out = {}
    for name, layout in chosen.items():
        dr = dataclasses.replace(DR, set="target", slots=len(ROWS) // layout.dp)
        layout = dataclasses.replace(layout, per_token=True)
        out[name] = train(layout, dr, 1, loss="token-pg")[2]
    return out


def test_a_targets_token_pg_is_advantages_by_token_times_log_probabilities() -> None:
    """The dense gradient, in every layout; advantages of tokens of a completion differ."""
    p = {k: v.double().requires_grad_() for k, v in initial().items()}
    every, tokens = [*range(len(BY_POLICY))], int(BY_POLICY.mask_NT.sum())
    assert BY_POLICY.advantage_NA[0, BY_POLICY.mask_NT[0].bool()].unique().numel() == 3
    wanted = gradient(p, BY_POLICY, every, True, tokens)
    wanted = {name: v for name, v in wanted.items() if not name.startswith(HEAD)}
    chosen = {name: layout for name, layout in TWO.items() if not name.endswith("sharded")}
    for ranks in (run_ranks(1, by_token, {"one": Layout()}), run_ranks(2, by_token, chosen)):
        for name in ranks[0]:
            found = _megatron.whole([rank[name] for rank in ranks])
            close({k: found[k] for k in wanted}, wanted, 1e-3, 3e-6, name)


def rates() -> dict[str, list[float]]:
    """On a rank: greatest and least learning rate of each parameter of a model with a head."""
    with_head()
    _megatron.initialize(Layout())
    model = _megatron.build(Layout(), initial())[0]
    config = OptimizerConfig(lr=1e-5, min_lr=1e-6, decoupled_lr=5e-4, decoupled_min_lr=2e-4)
    groups = _get_param_groups(model, config, get_standard_config_overrides(config))
    name_of = {id(p): name for name, p in model[0].module.named_parameters()}
    return {name_of[id(p)]: [g["max_lr"], g["min_lr"]] for g in groups for p in g["params"]}


def test_the_head_has_the_output_layers_rate() -> None:
    (found,) = run_ranks(1, rates)
    apart = {f"{HEAD}weight", f"{HEAD}bias", "output_layer.weight",
             "embedding.word_embeddings.weight"}  # fmt: skip
    assert {name for name, rate in found.items() if rate == [5e-4, 2e-4]} == apart
    assert all(rate == [1e-5, 1e-6] for name, rate in found.items() if name not in apart)


SAMPLES = [
    DRConfig(set="mean", blocks="matrix", rows="sample", alpha=0.0, norm="none"),
    DRConfig(set="cone", blocks="matrix", rows="sample"),
    DRConfig(set="cone", blocks="model", rows="sample"),
    DRConfig(set="cone", blocks="layer", rows="sample", passes=2),
    DRConfig(set="filter", blocks="matrix", rows="sample", target_pass="merged", alpha=0.0),
]


def samples(layout: Layout) -> list[Any]:
    with_head()
    return [train(layout, dr, 1, size=2, loss="train-loss")[2] for dr in SAMPLES]


@pytest.mark.parametrize("layout", [Layout(), Layout(**_SP)], ids=["one", "tp2 sp"])
def test_with_sample_rows_the_head_gets_the_mean(layout: Layout) -> None:
    """And so does everything with the set `mean`: values' gradients flow into the trunk."""
    p = {k: v.double().requires_grad_() for k, v in initial().items()}
    tokens = int(GENERAL.mask_NT.sum())
    mean = gradient(p, GENERAL, [*range(len(ROWS))], False, tokens)
    ranks = run_ranks(layout.world, samples, dataclasses.replace(layout, per_token=True))
    for number, dr in enumerate(SAMPLES):
        found = _megatron.whole([rank[number] for rank in ranks])
        head = {k: v for k, v in mean.items() if k.startswith(HEAD)}
        kept = found if dr.set == "mean" else {k: found[k] for k in head}
        close(kept, mean if dr.set == "mean" else head, 1e-3, 3e-6, str(dr))
        assert any(v.any() for k, v in found.items() if k not in head)
