"""One GRPO step's gradient on a Megatron model, against plain loops over completions in float64."""

import pytest
import torch

from megatron_dr.mcore.rl.collect import draw

from . import _megatron
from ._data import Layout
from ._ranks import run_ranks
from ._rl_step import KL, expected, step


@pytest.mark.parametrize("by_reward", [False, True], ids=["policy", "reward"])
@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize("layout", [Layout(per_token=True), Layout(per_token=True, dp=2)],
                         ids=["one", "dp2"])  # fmt: skip
def test_gradient_is_that_of_plain_loops(layout: Layout, aggregation: str, by_reward: bool) -> None:
    loss, gradients = expected(aggregation, by_reward)
    ranks = run_ranks(layout.world, step, layout, aggregation, by_reward)
    found = _megatron.whole([pieces for _, pieces in ranks])
    for name, value in gradients.items():
        torch.testing.assert_close(
            found[name], value.reshape(-1).float(), rtol=1e-3, atol=2e-6, msg=name
        )
    pairs = {
        name: sum(report[name] for reports, _ in ranks for report in reports)
        for name in ("policy loss", "kl", "clipped")
    }
    policy, kl, clipped = (float(total / count) for total, count in pairs.values())
    assert policy + (0 if by_reward else KL * kl) == pytest.approx(loss, rel=1e-4)
    assert (clipped == 0) == by_reward and clipped < 1


def test_draws_differ_by_role_and_rollout_and_repeat() -> None:
    seeds = [draw(s, role, n) for s in (0, 1) for role in ("general", "target") for n in (0, 1)]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**64 for s in seeds)
    assert draw(1, "target", 7) == draw(1, "target", 7)
