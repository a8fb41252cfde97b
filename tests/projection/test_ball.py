"""The ball around the mean: KKT, another solver, and its limits."""

import numpy as np
import pytest
import scipy.optimize
import torch
from _asserts import assert_near, assert_optimal_in_ball
from _samplers import KINDS, TARGETS, products, rows, target

from megatron_dr.projection import Ball, Mean, Span


@pytest.mark.parametrize(
    "radius, ridge", [(0.5, 0.0), (3.0, 0.0), (1e-3, 1e-6), (0.5, 1e-6), (0.5, 0.3), (3.0, 0.3)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_ball_is_optimal(kind: str, radius: float, ridge: float) -> None:
    for count in (2, 12, 33):
        J = torch.cat([rows(kind, 4, count)] * len(TARGETS))
        t = torch.cat([target(x, J[:4]) for x in TARGETS])
        G, c = products(J, t)
        assert_optimal_in_ball(G, c, Ball(radius, ridge).weights(G, c), radius, ridge)


def test_ball_against_another_solver() -> None:
    """Sequential quadratic programming on the weights, from the constraint itself."""
    J = rows("generic", 6, 4, elements=6)
    t = target("outside", J)
    w = Ball(0.5, 0.1).weights(*products(J, t))
    for w_M, j, x in zip(w.numpy(), J.numpy(), t.numpy(), strict=True):
        assert np.abs(sequential(j, x, radius=0.5, ridge=0.1) - w_M).max() < 1e-5


def sequential(j: np.ndarray, x: np.ndarray, radius: float, ridge: float) -> np.ndarray:
    p, mean, rho = np.full(len(j), 1 / len(j)), j.mean(0), ridge * (j**2).sum() / len(j)

    def objective(w: np.ndarray) -> float:
        return ((j.T @ w - x) ** 2).sum() + rho * ((w - p) ** 2).sum()

    def room(w: np.ndarray) -> float:
        return radius**2 * mean @ mean - ((j.T @ w - mean) ** 2).sum()

    inside, options = {"type": "ineq", "fun": room}, {"ftol": 1e-14, "maxiter": 500}
    return scipy.optimize.minimize(objective, p, constraints=inside, options=options).x


def test_limits_of_the_ball() -> None:
    J = rows("generic", 5, 9, elements=20)
    G, c = products(J, target("outside", J))
    for ridge in (0.0, 0.2):
        assert torch.equal(Ball(0.0, ridge).weights(G, c), Mean().weights(G, c))
        assert_near(Ball(1e6, ridge).weights(G, c), Span(ridge).weights(G, c), 1e-9)
    J[:, 8] = -J[:, :8].sum(1)  # the rows' mean is zero
    G, c = products(J, target("outside", J))
    assert_near(Ball(0.5, 0.2).weights(G, c), Mean().weights(G, c), 1e-6)
