"""Rollouts with top-k and a least length: the oracle's tokens, also under tensor parallelism."""

from functools import cache
from typing import Any

import torch

from megatron_dr.mcore.rollouts.megatron import MegatronRollouts
from megatron_dr.rl.rollouts import SamplingParams

from . import _data, _megatron, _rollouts
from ._data import VOCAB, Layout
from ._ranks import run_ranks
from ._rollouts import CONTEXT, PROMPTS, SEED

LEAST = 4
SAMPLINGS = (
    SamplingParams(6, temperature=1.5, top_k=5),
    SamplingParams(6, temperature=1.5, top_k=5, min_tokens=LEAST),
    SamplingParams(6, temperature=1.5, top_p=0.8, top_k=9, min_tokens=2),
    SamplingParams(6, temperature=0.0, min_tokens=LEAST),
)


@cache
def parameters() -> dict[str, torch.Tensor]:
    return {k: v.double() for k, v in _rollouts.initial(Layout()).items()}


@cache
def ends() -> tuple[int, ...]:
    """Two tokens: what the likeliest completions of the first prompts begin with."""
    greedy = SamplingParams(1, temperature=0.0)
    return tuple({_rollouts.complete(parameters(), n, greedy)[0][0] for n in (0, 1)})


def roll_out(layout: Layout) -> Any:
    """On a rank: each sampling's completions."""
    _data.LENGTH = CONTEXT
    _megatron.initialize(layout)
    model = _megatron.build(layout, _rollouts.initial(layout))[0]
    rollouts = MegatronRollouts(model, VOCAB, (*ends(), VOCAB + 1))  # one is of the padded ids
    found = [rollouts.generate(PROMPTS, sampling, SEED) for sampling in SAMPLINGS]
    return [[(list(c.ids), list(c.log_probs), c.finish_reason) for c in all_] for all_ in found]


def test_tokens_are_the_oracles_and_none_ends_too_early() -> None:
    with torch.no_grad():
        wanted = [[_rollouts.complete(parameters(), n, sampling, ends())
                   for n in range(len(PROMPTS))] for sampling in SAMPLINGS]  # fmt: skip
    for layout in (Layout(), Layout(tp=2)):
        for written in run_ranks(layout.world, roll_out, layout):
            for got, want in zip(written, wanted, strict=True):
                assert [(ids, end) for ids, _, end in got] == [(ids, end) for ids, _, end in want]
                for (_, found, _), (_, exact, _) in zip(got, want, strict=True):
                    torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)
    free, least, _, greedy = wanted
    assert any(end == "stop" and len(ids) <= LEAST for ids, _, end in free)  # else nothing was kept
    for ids, _, end in (*least, *greedy):
        assert not set(ids[:LEAST]) & set(ends())
        assert end == "length" or len(ids) > LEAST
    assert any(end == "stop" for _, _, end in (*least, *greedy))
