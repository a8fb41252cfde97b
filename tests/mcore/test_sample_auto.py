"""Sample rows of a whole step: alpha and beta are those of dense samples, in every layout."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dr.config.dr import DRConfig
from megatron_dr.projection import project, rule, safest_alpha

from . import _megatron, _oracle, _problem, _samples
from ._data import Layout
from ._ranks import run_ranks
from ._sample_oracle import Oracle, _mix, _sample_gradients
from ._samples import MICROBATCHES, SAMPLES, TARGETS, Case, batch


@dataclass(frozen=True)
class Auto(Case):
    set: str = "cone"
    norm: str = "general"
    window: str = "step"
    alpha_style: str = "auto"
    target_size: int = 40
    alpha_steps: int = 10


OWN = Auto(passes=2)
MERGED = Auto(target_pass="merged", norm="tokens")
LAYOUTS = {
    "own": (Layout(), OWN),
    "own-tp2-sp": (Layout(tp=2, sequence_parallel=True), OWN),
    "own-dp2-token": (Layout(dp=2, per_token=True, distributed_optimizer=True), OWN),
    "own-pp2-tied": (Layout(pp=2, tied=True), replace(OWN, score="sketched")),
    "merged": (Layout(), MERGED),
    "merged-dp2-layer": (Layout(dp=2), replace(MERGED, blocks="layer")),
    "merged-two-passes-token": (Layout(per_token=True), replace(MERGED, passes=2)),
    "topk": (Layout(), replace(OWN, set="topk", norm="tokens", blocks="model")),
}


@pytest.mark.parametrize("layout, case", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_what_is_chosen_is_of_dense_samples(layout: Layout, case: Auto) -> None:
    initial = _oracle.initial(layout)
    ranks = run_ranks(layout.world, _samples.train, layout, case, 1, initial)
    found = [log[0] for _, log in ranks if log[0]]
    wanted = expected(layout, case, initial)
    for values in found:
        for name, value in wanted.items():
            assert values[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name


def expected(layout: Layout, case: Auto, initial: Any) -> dict[str, float]:
    """The log of the first step, from dense gradients of single samples."""
    p = {k: v.double().requires_grad_() for k, v in initial.items()}
    oracle, numbers = Oracle(replace(layout.alone, dp=layout.dp), case), range(MICROBATCHES)
    size = TARGETS if case.target_pass == "merged" else SAMPLES

    def of(role: str, count: int) -> list[list[Any]]:
        return [[_sample_gradients(p, batch(layout, role, 0, r, n, count)) for n in numbers]
                for r in range(layout.dp)]  # fmt: skip

    general, target = of("general", SAMPLES), of("target", size)
    tokens = sum(own.sum() for rank in general for _, own in rank)
    shares = [(s, oracle._share(own, tokens) / own.sum(), t)
              for rank in general for samples, own in rank
              for s, t in zip(samples, own, strict=True)]  # fmt: skip
    rows = [_mix([s], [f * len(shares)]) for s, f, _ in shares]
    t = oracle._mean([part for rank in target for part in rank])
    e = _difference(layout, case, target)
    grams = []
    for members in _problem.blocks(case.blocks, t).values():
        seen = np.stack([oracle._seen(g, members) for g in (*rows, t, e)])
        grams.append(torch.from_numpy(seen @ seen.T))
    gram = torch.stack(grams)
    share_M = torch.tensor([t for *_, t in shares]).double() / float(tokens)
    set_ = DRConfig(rows="sample", **vars(case)).feasible_set()
    found = rule.seen(set_, case.norm, gram, share_M)
    samples = size * MICROBATCHES * layout.dp
    passes = case.alpha_steps * samples / case.target_size
    choice = rule.chosen(rule.gathered(None, found), found, passes)
    alpha, beta = rule.shares(choice, found)
    update = project(gram[:, :-1, :-1], set_, case.norm, alpha, share_M, None, beta)
    u, M = update.update_BR, update.gram_BRR
    square = torch.einsum("br,brs,bs->", u, M, u)
    cosine = (torch.einsum("br,br->", u, M[:, -1]) / (square * M[:, -1, -1].sum()).sqrt()).item()
    named = {"alpha": alpha, "beta": beta, "r": choice.r, "D": choice.D, "G": choice.G,
             "m": choice.m, "E": passes, "cos update": cosine}  # fmt: skip
    return {f"dr {name}": float(value) for name, value in named.items()}


def _difference(layout: Layout, case: Auto, target: list[list[Any]]) -> dict[str, torch.Tensor]:
    """e: what t is, with a sign for each microbatch: the first half of a rank's are half A."""
    total = sum(own.sum() for rank in target for _, own in rank)
    parts, factors = [], []
    for rank in target:
        for n, (samples, own) in enumerate(rank):
            sign = 1.0 if n < MICROBATCHES // 2 else -1.0
            mean = 1 / total if layout.per_token else 1 / own.sum() / layout.dp / MICROBATCHES
            parts += samples
            factors += [sign * mean] * len(samples)
    return _mix(parts, factors)


@pytest.mark.parametrize(
    "dials", [{"blocks": "matrix"}, {}, {"passes": 2}], ids=["immediate", "deferred", "two passes"]
)
def test_where_alpha_would_come_too_late_it_is_the_safest_constant(dials: Any) -> None:
    layout, case = Layout(), Auto(window="microbatch", **{"blocks": "model", **dials})
    initial = _oracle.initial(layout)
    passes = case.alpha_steps * SAMPLES * MICROBATCHES / case.target_size
    constant = replace(case, alpha_style="constant", alpha=safest_alpha(passes))
    runs = [run_ranks(1, _samples.train, layout, each, 2, initial) for each in (case, constant)]
    auto, wanted = (_megatron.whole([run[0][0]]) for run in runs)
    assert [line["dr alpha"] for line in runs[0][0][1]] == [constant.alpha] * 2
    for name, value in wanted.items():
        assert torch.equal(auto[name], value), name
