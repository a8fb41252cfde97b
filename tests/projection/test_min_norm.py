"""The point of several gradients' hull that is nearest to 0: its conditions, and its limits."""

import pytest
import torch

from megatron_dr.projection.min_norm import min_norm


@pytest.mark.parametrize("targets", [2, 3, 7])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
def test_no_target_gains_less_than_those_with_a_weight(targets: int, scale: float) -> None:
    """<t_k, t> >= |t|^2, with equality where w_k > 0: what makes the least gain the largest."""
    noise = torch.Generator().manual_seed(targets)
    for shift in (0.0, 0.5, 3.0):
        vectors = torch.randn(targets, 40, generator=noise, dtype=torch.float64) + shift
        vectors *= scale * torch.arange(1, targets + 1)[:, None]
        w_K = min_norm(vectors @ vectors.T)
        assert w_K.min() >= 0 and w_K.sum() == pytest.approx(1.0)
        t = w_K @ vectors
        gains, square = vectors @ t, t @ t
        assert (gains >= square * (1 - 1e-5)).all()
        assert ((gains <= square * (1 + 1e-5)) | (w_K < 1e-5)).all()


def test_limits() -> None:
    """Opposites leave nothing, one that all others gain by is alone, twins share, NaN is NaN."""
    eye = torch.eye(2, dtype=torch.float64)
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    nested = torch.tensor([[1.0, 2.0], [2.0, 9.0]], dtype=torch.float64)
    for gram, wanted in ((eye, [0.5, 0.5]), (opposite, [0.5, 0.5]), (nested, [1.0, 0.0]),
                         (torch.ones_like(eye), [0.5, 0.5])):  # fmt: skip
        torch.testing.assert_close(
            min_norm(gram), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-6
        )
    assert min_norm(torch.full_like(eye, torch.nan)).isnan().all()
