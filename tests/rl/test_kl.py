"""Estimators of the KL: their means on a small distribution, and where each one is used."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_dr.config.rl import RLConfig
from megatron_dr.rl import advantages, losses
from megatron_dr.rl.experience import Experience
from megatron_dr.rl.objective import objective
from megatron_dr.rl.ppo import Estimator
from megatron_dr.rl.weights import token_weights

P, Q = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.35, 0.15, 0.4]], dtype=torch.float64)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def by_hand(new: float, reference: float, estimator: str) -> float:
    ratio = math.exp(reference) / math.exp(new)
    return {"k1": -math.log(ratio), "k2": math.log(ratio) ** 2 / 2,
            "k3": ratio - 1 - math.log(ratio)}[estimator]  # fmt: skip


def test_means_over_the_policy_are_the_kl() -> None:
    """Of k1 and k3; that of k2 where policy and reference are near."""
    d = Q.log() - P.log()
    for estimator in ("k1", "k3"):
        assert_close((P * losses.kl_estimates(d, estimator)).sum(), kl(P, Q))
    for estimator in ("k2", "k3"):
        assert (losses.kl_estimates(d, estimator) >= 0).all()
    assert abs((P * losses.kl_estimates(d, "k2")).sum() - kl(P, Q)) > 0.01
    near = P + 1e-3 * (Q - P)
    mean = (P * losses.kl_estimates(near.log() - P.log(), "k2")).sum()
    assert_close(mean, kl(P, near), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradients_of_the_losses_are_those_of_the_kl(estimator: losses.KLEstimator) -> None:
    """Samples are the policy's, so each token's loss weighs as its probability."""
    logits = P.log().requires_grad_()
    total, _ = losses.kl_loss(
        logits.log_softmax(0)[None], Q.log()[None],
        token_weights(torch.ones(1, 4), "token")._replace(weight_BT=P[None]), estimator,
    )  # fmt: skip
    found = torch.autograd.grad(total, logits)[0]
    p = logits.softmax(0)
    wanted = {"k1": 0.0 * p.sum(), "k2": kl(p, Q), "k3": kl(Q, p)}[estimator]
    assert_close(found, torch.autograd.grad(wanted, logits)[0], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_token_rewards_and_the_steered_kl_have_the_estimate(estimator: losses.KLEstimator) -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    old, reference = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(3))
    old, reference = (x.double().masked_fill(mask == 0, -torch.inf) for x in (old, reference))
    score = torch.tensor([2.0, -1.0], dtype=torch.float64)
    got = advantages.token_rewards(score, old, reference, mask, 0.1, estimator)
    sums = []
    for b, length in enumerate((3, 1)):
        terms = [by_hand(float(old[b, t]), float(reference[b, t]), estimator)
                 for t in range(length)]  # fmt: skip
        wanted = [-0.1 * term for term in terms]
        wanted[-1] += float(score[b])
        assert got[b].tolist() == pytest.approx([*wanted, *[0.0] * (4 - length)])
        sums.append(sum(terms))
    made = Experience(0, mask, mask, old, reference, score, score[:, None], {})
    assert made.kl_N(estimator).tolist() == pytest.approx(sums)
    value = torch.zeros(2, 4)
    rl = RLConfig(algorithm="ppo", reward="a:b", kl=0.1, kl_estimator=estimator, kl_target=50.0,
                  kl_horizon=4)  # fmt: skip
    made = dataclasses.replace(made, old_NT=old.nan_to_num(neginf=0.0),
                               reference_NT=reference.nan_to_num(neginf=0.0))  # fmt: skip
    ppo = Estimator(rl)
    statistics = ppo.complete(made, value, by_reward=False).statistics
    assert statistics["kl of a completion"] == pytest.approx(sum(sums) / 2)
    ppo.steer(made)
    error = max(-0.2, sum(sums) / 2 / 50.0 - 1)
    assert ppo.kl_weight == pytest.approx(0.1 * (1 + error * 2 / 4))


def test_grpos_loss_has_the_estimate_and_the_log_has_k3() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    new, reference = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(4)).double()
    made = Experience(0, mask, mask, new, reference, torch.ones(2), torch.zeros(2, 1), {})
    batch = made.batch([0, 1], "token", plain=False)
    for estimator in ("k2", "k3"):
        rl = RLConfig(reward="a:b", kl=0.5, kl_estimator=estimator)
        loss, _, pairs = objective(new, None, batch, rl)
        places = [(b, t) for b in range(2) for t in range(3) if mask[b, t]]
        sums = {
            name: sum(by_hand(float(new[x]), float(reference[x]), name) for x in places)
            for name in ("k2", "k3")
        }
        assert float(loss) == pytest.approx(0.5 * sums[estimator])
        assert float(pairs["kl"][0]) == pytest.approx(sums["k3"])


def test_the_estimator_is_the_algorithms_own_unless_given() -> None:
    assert RLConfig(reward="a:b").estimator == "k3"
    assert RLConfig(reward="a:b", algorithm="ppo").estimator == "k1"
    assert RLConfig(reward="a:b", algorithm="ppo", kl_estimator="k3").estimator == "k3"
    with pytest.raises(ValueError, match="a KL estimator is 'k1', 'k2' or 'k3', not 'k4'"):
        losses.kl_estimates(P, "k4")  # type: ignore[arg-type]
