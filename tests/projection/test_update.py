"""The equation's limits, and that it is the one that dense gradients obey."""

import pytest
import torch
from _samplers import combine, normal, rows, target

from megatron_dr.projection import Cone, Halfspace, Mean, Target, gram_of, project


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """X [B, R, N], the rows and last the target, and their gram."""
    J = rows("generic", 3, 5, seed=seed, elements=9)
    X = torch.cat([J, target("outside", J)[:, None]], 1)
    return X, gram_of(X)


@pytest.mark.parametrize("alpha", [0.0, 0.3, torch.tensor(0.7)])
def test_u_of_dense_gradients(alpha: float) -> None:
    X, gram = problem()
    found = project(gram, Halfspace(), "general", alpha)
    d, t, mean = combine(X, found.direction_BR), X[:, -1], X[:, :-1].mean(1)
    s = mean.norm(dim=1) / d.norm(dim=1)
    u = (1 - alpha) * s[:, None] * d + alpha * t
    assert torch.allclose(combine(X, found.update_BR), u, rtol=1e-12)
    assert torch.equal(found.direction_BR[:, :-1], found.weights_BM) and found.alpha is alpha


def test_limits() -> None:
    X, gram = problem()
    assert torch.allclose(combine(X, project(gram, Mean(), "general").update_BR), X[:, :-1].mean(1))
    only = project(gram, Target(), "target", 0.4)  # s d + t: the same direction whatever alpha
    assert torch.allclose(combine(X, only.update_BR), X[:, -1])
    assert torch.allclose(combine(X, project(gram, Cone(), "none", 1.0).update_BR), X[:, -1])


def test_given_weights_are_not_solved_for() -> None:
    _, gram = problem()
    weights = normal(3, 5, seed=4)
    assert project(gram, Cone(), "none", weights_BM=weights).weights_BM is weights
