"""Advantages, GAE, DPO and the adaptive KL against loops and their limits."""

import math

import pytest
import torch
from torch.testing import assert_close

from megatron_dr.rl import advantages, preference
from megatron_dr.rl.ppo import steered
from tests.rl import _dense

NAN = float("nan")
GROUP = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 4])
REWARD = torch.tensor([1.0, 0.0, 0.5, 0.1, 0.1, 0.1, NAN, NAN, 7.0, NAN]).double()
LENGTHS = [6, 1, 0, 4]


def test_group_advantages_are_the_equation() -> None:
    reward = torch.cat([REWARD, torch.tensor([3.0, NAN, 1.0, -2.0]).double()])
    group = torch.cat([GROUP, torch.tensor([5, 5, 5, 5])])
    want = _dense.group_advantages(reward.tolist(), group.tolist())
    assert_close(advantages.group_advantages(reward, group), torch.tensor(want).double())


def test_equal_missing_and_lone_rewards_give_exactly_zero() -> None:
    got = advantages.group_advantages(REWARD, GROUP)
    assert got[3:].tolist() == [0.0] * 7
    for n in range(2, 40):  # the mean of n times 0.1 is not always 0.1
        equal = torch.full((n,), 0.1, dtype=torch.float64)
        assert advantages.normalised(equal).count_nonzero() == 0
    assert advantages.group_advantages(torch.empty(0), torch.empty(0).long()).shape == (0,)


def test_order_and_numbering_of_groups_change_nothing() -> None:
    order = torch.randperm(len(GROUP), generator=torch.Generator().manual_seed(0))
    moved = advantages.group_advantages(REWARD[order], (9 - GROUP)[order])
    assert_close(moved, advantages.group_advantages(REWARD, GROUP)[order], rtol=0, atol=1e-15)


def test_normalised_rewards_have_mean_zero_and_deviation_one() -> None:
    got = advantages.normalised(torch.tensor([3.0, 5.0, 100.0, NAN, -2.0]))
    assert got[3] == 0
    kept = got[[0, 1, 2, 4]]
    assert_close(kept.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert_close(kept.std(), torch.tensor(1.0), atol=1e-5, rtol=0)


def trajectories() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    reward, value = torch.randn(2, 4, 8, dtype=torch.float64, generator=generator)
    mask = torch.arange(8)[None] < torch.tensor(LENGTHS)[:, None]
    # whatever stands in the padding
    return reward.masked_fill(~mask, torch.nan), value.masked_fill(~mask, torch.inf), mask


@pytest.mark.parametrize("discount, decay", [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (0.9, 0.0)])
def test_gae_is_the_double_sum(discount: float, decay: float) -> None:
    reward, value, mask = trajectories()
    got, returns = advantages.gae(reward, value, mask, discount, decay)
    for b, n in enumerate(LENGTHS):
        r, v = reward[b, :n].tolist(), value[b, :n].tolist()
        want = _dense.gae(r, v, discount, decay)
        assert_close(got[b, :n], torch.tensor(want).double())
        assert_close(returns[b, :n], got[b, :n] + value[b, :n])
        assert got[b, n:].count_nonzero() == 0 and returns[b, n:].count_nonzero() == 0


def test_gae_limits() -> None:
    """decay 0: the error of one step; decay 1: discounted rewards to come less the value."""
    reward, value, mask = trajectories()
    one, _ = advantages.gae(reward, value, mask, 0.9, 0.0)
    assert_close(one[0, :5], reward[0, :5] + 0.9 * value[0, 1:6] - value[0, :5])
    full, returns = advantages.gae(reward, value, mask, 0.9, 1.0)
    to_come = [sum(0.9 ** (k - t) * reward[0, k].item() for k in range(t, 6)) for t in range(6)]
    assert_close(returns[0, :6], torch.tensor(to_come).double())
    assert_close(full[0, :6], returns[0, :6] - value[0, :6])


def test_gae_refuses_holes_and_bad_factors() -> None:
    reward, value, _ = trajectories()
    with pytest.raises(ValueError, match="right-padded"):
        advantages.gae(reward[:1], value[:1], torch.tensor([[1, 0, 1, 0, 0, 0, 0, 0]]), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        advantages.gae(reward, value, torch.ones(4, 8), 1.1, 1.0)


def test_token_rewards_put_the_score_at_the_last_token() -> None:
    mask, score = trajectories()[2], torch.randn(4, dtype=torch.float64)
    new, reference = torch.randn(2, 4, 8, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    got = advantages.token_rewards(score, new, reference, mask, 0.1)
    for b, n in enumerate(LENGTHS):
        want = -0.1 * (new - reference)[b, :n]
        if n:
            want[n - 1] += score[b]
        assert_close(got[b, :n], want)
        assert got[b, n:].count_nonzero() == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_is_the_equation_and_splits(smoothing: float) -> None:
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    chosen = x[0].clone().requires_grad_()
    total, count = preference.dpo_loss(chosen, *x[1:], 0.7, smoothing)
    ratios = [(x[0, p] - x[2, p], x[1, p] - x[3, p]) for p in range(5)]
    want = sum(_dense.dpo(c.item(), r.item(), 0.7, smoothing) for c, r in ratios)
    assert_close(total.item(), want)
    assert count == 5
    grad = torch.autograd.grad(total, chosen)[0]
    step = 1e-6
    slopes = [
        (_dense.dpo(c.item() + step, r.item(), 0.7, smoothing)
         - _dense.dpo(c.item() - step, r.item(), 0.7, smoothing)) / (2 * step)
        for c, r in ratios
    ]  # fmt: skip
    assert_close(grad, torch.tensor(slopes).double(), rtol=1e-6, atol=1e-8)
    first = preference.dpo_loss(*x[:, :2], 0.7, smoothing)
    second = preference.dpo_loss(*x[:, 2:], 0.7, smoothing)
    assert_close(first[0] + second[0], total.detach())


def test_dpo_at_the_reference_is_log_two() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    total, count = preference.dpo_loss(*x, *x, beta=0.3, label_smoothing=0.2)
    assert_close(total / count, torch.tensor(math.log(2)).double())


def test_dpo_refuses_bad_arguments() -> None:
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="beta must be above 0"):
        preference.dpo_loss(*x, beta=0.0)
    with pytest.raises(ValueError, match="label smoothing"):
        preference.dpo_loss(*x, beta=1.0, label_smoothing=0.5)


def test_completion_log_prob_ignores_padding() -> None:
    got = preference.completion_log_prob(
        torch.tensor([[-1.0, -2.0, -math.inf], [NAN, NAN, NAN]]), torch.tensor([[1, 1, 0], [0] * 3])
    )
    assert got.tolist() == [-3.0, 0.0]


def test_the_kl_weight_moves_towards_the_target() -> None:
    weight = steered(0.2, 6.6, 1000, target=6.0, horizon=10_000)  # error 0.1
    assert_close(weight, 0.2 * (1 + 0.1 * 0.1))
    more = steered(weight, 600.0, 10**9, target=6.0, horizon=10_000)  # error and share are bounded
    assert_close(more, 0.2 * 1.01 * 1.2)
    assert_close(steered(more, 0.0, 5000, target=6.0, horizon=10_000), more * 0.9)


def test_a_kl_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="diverged"):
        steered(0.2, NAN, 10, target=6.0, horizon=100)
