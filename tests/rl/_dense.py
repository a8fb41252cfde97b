"""The equations of RL losses in Python loops over completions of their own lengths, in float64."""

import math
from collections.abc import Callable
from statistics import mean, stdev

import torch
from torch import Tensor

Token = Callable[[int, int], Tensor]  # loss of token t of completion b


def mean_over(lengths: list[int], aggregation: str, token: Token) -> Tensor:
    """The mean that (sum, count) must give; 0 where there is no token."""
    completions = [[token(b, t) for t in range(n)] for b, n in enumerate(lengths) if n]
    if not completions:
        return torch.zeros([], dtype=torch.float64)
    if aggregation == "sequence":
        return sum((sum(c) / len(c) for c in completions), torch.tensor(0.0)) / len(completions)
    tokens = [loss for c in completions for loss in c]
    return sum(tokens, torch.tensor(0.0)) / len(tokens)


def policy(new: Tensor, old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    ratio = math.e ** (new - old)
    a, r = advantage.item(), ratio.item()
    if a >= 0:
        return -a * (ratio if r <= 1 + clip else torch.tensor(1 + clip))
    return -a * (ratio if r >= 1 - clip else torch.tensor(1 - clip))


def k3(new: Tensor, reference: Tensor) -> Tensor:
    return math.e ** (reference - new) - 1 - (reference - new)


def value(new: Tensor, old: Tensor, target: Tensor, clip: float) -> Tensor:
    move = new - old
    if abs(move.item()) > clip:
        move = torch.tensor(math.copysign(clip, move.item()), dtype=torch.float64)
    plain, clipped = (new - target) ** 2, (old + move - target) ** 2
    return (plain if plain.item() >= clipped.item() else clipped) / 2


def group_advantages(rewards: list[float], groups: list[int]) -> list[float]:
    result = []
    for reward, group in zip(rewards, groups, strict=True):
        peers = [
            r for r, g in zip(rewards, groups, strict=True) if g == group and not math.isnan(r)
        ]
        if math.isnan(reward) or len(peers) < 2 or len(set(peers)) == 1:
            result.append(0.0)
        else:
            result.append((reward - mean(peers)) / (stdev(peers) + 1e-4))
    return result


def gae(rewards: list[float], values: list[float], discount: float, decay: float) -> list[float]:
    """A_t as the double sum: sum_k (discount decay)^k delta_{t+k}."""
    following = [*values[1:], 0.0]
    deltas = [r + discount * n - v for r, n, v in zip(rewards, following, values, strict=False)]
    return [
        sum((discount * decay) ** (k - t) * deltas[k] for k in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


def dpo(chosen: float, rejected: float, beta: float, smoothing: float) -> float:
    """Of log-ratios to the reference."""
    h = beta * (chosen - rejected)
    right, wrong = 1 / (1 + math.exp(-h)), 1 / (1 + math.exp(h))
    return -(1 - smoothing) * math.log(right) - smoothing * math.log(wrong)
