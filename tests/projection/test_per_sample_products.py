"""Products of samples' gradients that are made in another order: as those of autograd's."""

import pytest
import torch
from _pairs import KINDS, SHAPES, by_autograd, dense, pairs
from _samplers import normal

from megatron_dr.projection import per_sample

OF_EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("others", KINDS)
@OF_EVERY_SHAPE
@pytest.mark.parametrize("block", [per_sample.BLOCK, 3200])
def test_ghost_between(
    kind: str, others: str, shape: tuple[int, int, int, int], block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """<G_n, sum of the others' G>; at once and in blocks; the two may differ in kind and length."""
    monkeypatch.setattr(per_sample, "BLOCK", block)
    length, _, inner, out = shape
    uses = pairs(kind, shape, torch.float32)
    rest = pairs(others, (length + 2, 2, inner, out), torch.float32)
    g_NOI, target_OI = by_autograd(uses, out), by_autograd(rest, out).sum(0)
    expected = (g_NOI * target_OI).sum((1, 2))
    size_N = (1 + g_NOI.flatten(1).norm(dim=1)) * (1 + by_autograd(rest, out).norm())
    found = per_sample.ghost_between(uses, rest)
    assert found.dtype == torch.float32
    assert ((found.double() - expected).abs() <= 1e-5 * size_N).all()


@OF_EVERY_SHAPE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", ["all", "some", "none"])
def test_product(shape: tuple[int, int, int, int], dtype: torch.dtype, keep: str) -> None:
    """sum over n of a_n G_n, of the samples that are kept; a may be 0, negative or missing."""
    samples, out = shape[1], shape[3]
    x_LNI, dy_LNO = dense(*shape, dtype)
    a_N = normal(samples, seed=1)
    a_N[0] = 0.0
    keep_N = {"all": None, "some": torch.arange(0, samples, 2), "none": torch.arange(0)}[keep]
    kept = torch.ones(samples) if keep_N is None else torch.zeros(samples).index_fill(0, keep_N, 1)
    g_NOI = by_autograd([(x_LNI, dy_LNO)], out)
    for coefficient_N in (a_N, None):
        factor_N = kept.double() * (1.0 if coefficient_N is None else coefficient_N)
        product = per_sample.Weighted(x_LNI, dy_LNO, coefficient_N, keep_N).product()
        expected = (factor_N[:, None, None] * g_NOI).sum(0)
        assert product.dtype == dtype and product.shape == expected.shape
        size = 1 + (factor_N.abs()[:, None, None] * g_NOI.abs()).sum()
        assert ((product.double() - expected).abs() <= 4 * torch.finfo(dtype).eps * size).all()


def test_product_of_views() -> None:
    """Samples of a batch that is not contiguous."""
    x_LNI, dy_LNO = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in
                     dense(5, 4, 6, 3, torch.float32))  # fmt: skip
    a_N, keep_N = normal(4, seed=1), torch.tensor([1, 3])
    x_TI, dy_TO = per_sample.Weighted(x_LNI, dy_LNO, a_N, keep_N)
    product = per_sample.Weighted(x_LNI, dy_LNO, a_N, keep_N).product()
    assert torch.allclose(product, dy_TO.t() @ x_TI, atol=1e-5)
