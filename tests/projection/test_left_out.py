"""Rows that are left out, beside the few good ones by themselves."""

import math

import pytest
import torch

from megatron_dr.projection import Cone, Hull, project
from megatron_dr.projection.left_out import leave_out

ROWS, LENGTH = 4, 6


def vectors(halved: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(ROWS + 1 + halved, LENGTH, generator=generator, dtype=torch.float64)


def gram_of(x_RN: torch.Tensor) -> torch.Tensor:
    return (x_RN @ x_RN.T)[None]


def test_nothing_is_touched_where_all_is_finite() -> None:
    gram = gram_of(vectors(halved=True))
    found = leave_out(gram, torch.ones(ROWS + 2, dtype=torch.bool), ROWS)
    assert torch.equal(found.gram_BRR, gram) and torch.equal(found.seen_BRR, gram)
    u = torch.randn(1, ROWS + 1, dtype=torch.float64)
    assert torch.equal(found.coefficients(u), u) and not found.vectors(torch.eye(ROWS + 2)).any()
    assert found.share(0.0) == 0.0 and float(found.share(0.3)) == pytest.approx(0.3)


@pytest.mark.parametrize("bad", [(1,), (0, 3), (0, 1, 2)])
def test_the_good_rows_span_what_they_span_alone(bad: tuple[int, ...]) -> None:
    x = vectors()
    good = [n for n in range(ROWS) if n not in bad]
    finite = torch.tensor([n not in bad for n in range(ROWS)] + [True])
    gram = gram_of(x)
    gram[:, list(bad)] = gram[:, :, list(bad)] = math.nan
    found = leave_out(gram, finite, ROWS)
    assert found.gram_BRR.isfinite().all()
    for set_ in (Cone(), Hull()):
        u = found.coefficients(project(found.gram_BRR, set_, "general", 0.2).update_BR)
        assert (u[0, list(bad)] == 0).all()
        alone = project(gram_of(x[[*good, -1]]), set_, "general", 0.2).update_BR
        torch.testing.assert_close(u[0] @ x, alone[0] @ x[[*good, -1]], rtol=1e-6, atol=1e-8)


def test_a_bad_target_leaves_the_mean_of_the_good_rows() -> None:
    x = vectors(halved=True)
    gram = gram_of(x)
    finite = torch.tensor([True, False, True, True, True, False])  # one half is bad
    gram[:, 1] = gram[:, :, 1] = gram[:, 5] = gram[:, :, 5] = math.nan
    found = leave_out(gram, finite, ROWS)
    assert found.bad_target and found.seen_BRR[:, ROWS:].isnan().all()
    assert found.seen_BRR[:, :ROWS, :ROWS].isfinite().all()
    u = found.coefficients(torch.full((1, ROWS + 1), math.nan, dtype=torch.float64))
    torch.testing.assert_close(u[0], torch.tensor([1 / 3, 0, 1 / 3, 1 / 3, 0]).double())
    assert found.vectors(torch.eye(ROWS + 2)).tolist() == [False, True, False, False, True, True]
    assert float(found.share(torch.tensor(math.nan))) == 0.0
