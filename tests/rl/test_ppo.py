"""PPO's returns and advantages of a rollout against plain loops, and the KL's weight."""

import dataclasses
import math
from statistics import mean, stdev

import pytest
import torch

from megatron_dr.config.rl import RLConfig
from megatron_dr.rl.experience import Experience
from megatron_dr.rl.objective import objective
from megatron_dr.rl.ppo import Estimator, estimates

from . import _dense

# prompt's tokens - 1, completion's tokens, reward: one not scored, one empty, one to the end
ROWS = [(2, 4, 1.0), (0, 9, -0.5), (3, 1, math.nan), (4, 0, 2.0), (1, 2, 0.0), (0, 1, 0.7)]
LENGTH, KL, DISCOUNT, DECAY = 9, 0.3, 0.9, 0.8


def inputs(rewards: list[float]) -> list[torch.Tensor]:
    """Rewards, log-probabilities, the reference's, values and the mask; garbage at padding."""
    mask = torch.zeros(len(ROWS), LENGTH, dtype=torch.uint8)
    for n, (start, length, _) in enumerate(ROWS):
        mask[n, start : start + length] = 1
    noise = torch.Generator().manual_seed(3)
    values = torch.randn(3, len(ROWS), LENGTH, generator=noise, dtype=torch.float64)
    values[:, mask == 0] = 1e6
    return [torch.tensor(rewards, dtype=torch.float64), *values, mask]


def expected(rewards: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    _, old, reference, value, mask = inputs(rewards)
    advantage, returns = torch.zeros_like(old), torch.zeros_like(old)
    for n, (start, length, _) in enumerate(ROWS):
        own = slice(start, start + length)
        score = [0.0] * (length - 1) + [rewards[n]]
        r = [
            s - KL * float(d) for s, d in zip(score, old[n, own] - reference[n, own], strict=False)
        ]
        if math.isnan(rewards[n]):
            returns[n] = math.nan
        else:
            found = _dense.gae(r, value[n, own].tolist(), DISCOUNT, DECAY)
            advantage[n, own] = torch.tensor(found, dtype=torch.float64)
            returns[n, own] = advantage[n, own] + value[n, own]
    counts = (mask == 1) & ~torch.tensor(rewards).isnan()[:, None]
    seen = advantage[counts].tolist()
    if seen:
        whitened = [(a - mean(seen)) / (stdev(seen) + 1e-4) for a in seen]
        advantage[counts] = torch.tensor(whitened, dtype=torch.float64)
    return advantage, returns


@pytest.mark.parametrize("rewards", [[r for *_, r in ROWS], [1.0] * 6, [math.nan] * 6],
                         ids=["some", "equal", "none"])  # fmt: skip
def test_estimates_are_those_of_plain_loops(rewards: list[float]) -> None:
    found = estimates(*inputs(rewards), kl_weight=KL, discount=DISCOUNT, decay=DECAY)
    for got, want in zip(found, expected(rewards), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8, equal_nan=True)
    assert not found[0].isnan().any()


def rollout() -> tuple[Experience, torch.Tensor]:
    reward, old, reference, value, mask = inputs([r for *_, r in ROWS])
    tokens, advantage = torch.zeros_like(mask, dtype=torch.int32), torch.full((6, 1), 7.0)
    made = Experience(0, tokens, mask, old, reference, reward, advantage, {"reward": 0.5})
    return made, value


def test_a_rollout_gets_estimates_and_their_means() -> None:
    made, value = rollout()
    rl = RLConfig(algorithm="ppo", reward="a:b", kl=KL, discount=DISCOUNT, gae_decay=DECAY)
    found = Estimator(rl).complete(made, value, by_reward=False)
    advantage, returns = expected([r for *_, r in ROWS])
    torch.testing.assert_close(found.advantage_NA, advantage)
    torch.testing.assert_close(found.return_NT, returns, equal_nan=True)
    by_reward = Estimator(rl).complete(made, value, by_reward=True)
    assert torch.equal(by_reward.advantage_NA, made.advantage_NA)
    scored = (made.mask_NT == 1) & ~returns.isnan()
    assert found.statistics == pytest.approx({
        "reward": 0.5, "value": float(value[made.mask_NT == 1].mean()), "kl weight": KL,
        "return": float(returns[scored].mean()),
        "kl of a completion": float(made.kl_N("k1").sum() / 6),
    })  # fmt: skip


def test_nan_is_a_number_in_no_value_of_the_log() -> None:
    """A value head or a policy that has diverged; a completion that was not scored is left out."""
    rl = RLConfig(algorithm="ppo", reward="a:b", kl=KL)
    made, value = rollout()
    value[1, 0] = torch.nan
    statistics = Estimator(rl).complete(made, value, by_reward=False).statistics
    assert math.isnan(statistics["value"]) and math.isnan(statistics["return"])
    made, value = rollout()
    complete = Estimator(rl).complete(made, value, by_reward=False)
    batch = complete.batch(range(len(ROWS)), "token", plain=False)
    bad = torch.full_like(batch["old_log_prob"], torch.nan)
    report = objective(bad, torch.full_like(bad, torch.nan), batch, rl)[2]
    assert report.keys() == {"policy loss", "clipped", "kl", "value loss"}
    assert all(pair[0].isnan() for pair in report.values())


@pytest.mark.parametrize(
    "target, factor", [(None, 1.0), (0.01, 1 + 0.2 * 6 / 10), (100.0, 1 - 0.2 * 6 / 10)]
)
def test_the_weight_is_steered_where_it_has_a_target(target: float | None, factor: float) -> None:
    made, _ = rollout()
    made = dataclasses.replace(made, reference_NT=made.old_NT - 0.5)
    assert made.kl_N("k1").tolist() == pytest.approx([0.5 * length for _, length, _ in ROWS])
    rl = RLConfig(algorithm="ppo", reward="a:b", kl=KL, kl_target=target, kl_horizon=10)
    estimator = Estimator(rl)
    estimator.steer(made)
    assert estimator.kl_weight == pytest.approx(KL * factor)
