"""Subspaces: orthonormal uniform rows, others in every epoch, and squares carried over."""

import pytest
import torch

from megatron_dr.optim import Subspaces
from megatron_dr.optim.forms import transport_square

from ._meso import IN, K_IN, K_OUT, OUT


@pytest.mark.parametrize("seed", range(5))
def test_transported_square_is_a_mean(seed: int) -> None:
    """Between V's extremes; v 1 stays v 1; to the same subspace it stays V."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.rand(K_OUT, K_IN, generator=generator, dtype=torch.float64) + 0.1
    subspaces = Subspaces(seed)
    t = subspaces.transport("out", OUT, K_OUT, 0, 1, v)
    r = subspaces.transport("in", IN, K_IN, 0, 1, v)
    moved = transport_square(v, t, r)
    assert v.min() <= moved.min() and moved.max() <= v.max()
    ones = torch.full_like(v, 3.0)
    torch.testing.assert_close(transport_square(ones, t, r), ones)
    eye = torch.eye(K_OUT, dtype=v.dtype), torch.eye(K_IN, dtype=v.dtype)
    torch.testing.assert_close(transport_square(v, *eye), v)


def test_rows_are_orthonormal_and_uniform() -> None:
    """Q Q^T = I, and the mean of Q^T Q over seeds is (K/N) I: no direction is preferred."""
    like = torch.zeros(1, dtype=torch.float64)
    total = torch.zeros(8, 8, dtype=torch.float64)
    for seed in range(4000):
        q = Subspaces(seed).rows("out", 8, 3, 0, like)
        total += q.T @ q
    torch.testing.assert_close(q @ q.T, torch.eye(3, dtype=like.dtype))
    expected = 3 / 8 * torch.eye(8, dtype=like.dtype)
    torch.testing.assert_close(total / 4000, expected, atol=0.02, rtol=0)


def test_sides_lengths_epochs_and_seeds_have_their_own_rows() -> None:
    like, made = torch.zeros(1), []
    for seed, side, length, epoch in [
        (0, "out", 9, 0), (0, "in", 9, 0), (0, "out", 10, 0), (0, "out", 9, 1), (1, "out", 9, 0)
    ]:  # fmt: skip
        made.append(Subspaces(seed).rows(side, length, 3, epoch, like)[:, :9])
    for n, first in enumerate(made):
        assert not any(torch.allclose(first, second, atol=0.05) for second in made[:n])
