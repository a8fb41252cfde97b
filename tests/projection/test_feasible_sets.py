"""The theorems of the feasible sets, the oracle, and one frozen example per set."""

from collections.abc import Callable

import _reference
import numpy as np
import pytest
import torch
from _asserts import (
    assert_batch_independent,
    assert_feasible,
    assert_near,
    assert_permutes,
    assert_returns_target,
    assert_scale_free,
    assert_symmetric,
)
from _samplers import KINDS, combine, normal, products, rows, target
from torch import Tensor

from megatron_dr.projection import (
    Capped,
    Cone,
    FeasibleSet,
    Hull,
    Mean,
    Span,
    Target,
    TopK,
    norm_scale,
    report,
)

RIDGED = [
    Capped(0.5, 1e-3),
    Hull(1e-3),
    Cone(1e-3),
    Cone(1e-3, "zero"),
    Span(1e-3),
    Span(1e-3, "zero"),
]
BARE = [Capped(0.5), Hull(), Cone(), Span()]
SETS = [Mean(), Target(), TopK(0.4), *RIDGED, *BARE]


@pytest.mark.parametrize("set_", SETS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_finite_and_scale_free(set_: FeasibleSet, kind: str) -> None:
    J = rows(kind, 5, 10)
    # without a ridge, singular programs determine d; w only as far as the solver's tiny pull
    loose = set_ in BARE and kind != "generic"
    assert_scale_free(set_, J, target("outside", J), atol=1e-3 if loose else 1e-6)


@pytest.mark.parametrize("set_", SETS, ids=str)
@pytest.mark.parametrize("kind", ["generic", "zero_row", "common"])
def test_permutes_and_batches(set_: FeasibleSet, kind: str) -> None:
    J = rows(kind, 2, 10, elements=30)
    t = target("outside", J)
    assert_permutes(set_, J, t, atol=1e-6)
    assert_batch_independent(set_, J, t, atol=1e-6)


@pytest.mark.parametrize("set_", [*RIDGED, *BARE, Mean()], ids=str)
def test_duplicate_rows_share(set_: FeasibleSet) -> None:
    J = rows("duplicate_rows", 5, 12)
    for kind in ("outside", "in_hull", "opposite"):
        assert_symmetric(set_, J, target(kind, J), atol=1e-5)


@pytest.mark.parametrize("set_", SETS, ids=str)
def test_zero_rows_everywhere(set_: FeasibleSet) -> None:
    w = set_.weights(torch.zeros(2, 4, 4), torch.zeros(2, 4))
    assert w.isfinite().all()
    if not isinstance(set_, TopK):
        assert_near(w, w[:, :1].expand(-1, 4), 1e-12)


@pytest.mark.parametrize(
    "set_, kind",
    [
        (Hull(), "in_hull"),
        (Capped(0.05), "in_hull"),
        (Cone(), "in_hull"),
        (Cone(), "in_cone"),
        (Span(), "in_cone"),
        (Span(), "in_span"),
        (Span(centre="zero"), "in_span"),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows_kind", ["generic", "rank_deficient", "zero_row", "duplicate_rows"])
def test_feasible_target_is_returned(set_: FeasibleSet, kind: str, rows_kind: str) -> None:
    J = rows(rows_kind, 5, 12)
    assert_returns_target(set_, J, target(kind, J), rtol=1e-6)


def test_limits_of_capped() -> None:
    J = rows("generic", 5, 9)
    G, c = products(J, target("outside", J))
    assert torch.equal(Capped(1.0).weights(G, c), Mean().weights(G, c))
    hull = Hull(1e-2).weights(G, c)
    assert torch.equal(Capped(1 / 9, 1e-2).weights(G, c), hull)
    assert torch.equal(Capped(0.01, 1e-2).weights(G, c), hull)
    assert_feasible(Capped(0.4).weights(G, c), 1 / (0.4 * 9), 1.0)


def test_sets_are_nested() -> None:
    """A larger set is never farther from the target."""
    J = rows("generic", 6, 8, elements=12)
    t = target("outside", J)
    G, c = products(J, t)
    chain = [Mean(), Capped(0.7), Capped(0.4), Hull(), Cone(), Span()]
    distance = [(combine(J, s.weights(G, c)) - t).norm(dim=1) for s in chain]
    for small, large in zip(distance, distance[1:], strict=False):
        assert (large <= small * (1 + 1e-9)).all()


def test_blocks_with_equal_products_equal_one_model() -> None:
    """Where every block's gram is the model's up to scale, blockwise is the model's solution."""
    J = rows("generic", 1, 6)
    t = target("outside", J)
    model = Hull().weights(*products(torch.cat([J, 2 * J], 2), torch.cat([t, 2 * t], 1)))
    parts = Hull().weights(*products(torch.cat([J, 2 * J]), torch.cat([t, 2 * t])))
    assert_near(parts, model.expand(2, -1), 1e-6)


def test_grams_of_parts_sum_to_the_model() -> None:
    J = rows("generic", 1, 6, elements=20)
    t = target("outside", J)
    whole = products(J, t)
    cuts = zip(J.split(7, 2), t.split(7, 1), strict=True)
    parts = [sum(pieces) for pieces in zip(*(products(*cut) for cut in cuts), strict=True)]
    assert_near(Cone().weights(*parts), Cone().weights(*whole), 1e-8)  # type: ignore[arg-type]


def test_one_row() -> None:
    J = torch.tensor([[[3.0, 4.0]], [[3.0, 4.0]]], dtype=torch.float64)
    t = torch.tensor([[6.0, 8.0], [-3.0, -4.0]], dtype=torch.float64)
    G, c = products(J, t)
    for set_ in (Mean(), TopK(0.3), Capped(0.5), Hull(), Capped(1.0)):
        assert torch.equal(set_.weights(G, c), torch.ones(2, 1).double())
    assert (Cone().weights(G, c) - torch.tensor([[2.0], [0.0]])).abs().max() < 1e-6
    assert (Span().weights(G, c) - torch.tensor([[2.0], [-1.0]])).abs().max() < 1e-9


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_reference(kind: str, ridge: float) -> None:
    J = rows(kind, 3, 5)
    J = torch.cat([J, J, J, J])
    t = torch.cat([target(k, J[:3]) for k in ("outside", "in_hull", "in_cone", "opposite")])
    compare(Capped(0.5, ridge), J, t, lambda j, x: _reference.capped(j, x, 0.4, ridge))
    compare(Hull(ridge), J, t, lambda j, x: _reference.capped(j, x, 1.0, ridge))
    compare(Cone(ridge), J, t, lambda j, x: _reference.cone(j, x, ridge, 0.2))
    compare(Cone(ridge, "zero"), J, t, lambda j, x: _reference.cone(j, x, ridge, 0.0))
    compare(Span(ridge), J, t, lambda j, x: _reference.span(j, x, ridge, 0.2))
    compare(Span(ridge, "zero"), J, t, lambda j, x: _reference.span(j, x, ridge, 0.0))


def compare(
    set_: FeasibleSet,
    J: Tensor,
    t: Tensor,
    solve: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> None:
    """The update always; the weights too where a ridge makes them unique."""
    ours = set_.weights(*products(J, t)).numpy()
    for ours_M, j, x in zip(ours, J.numpy(), t.numpy(), strict=True):
        w = solve(j, x)
        size = max(np.abs(j).max() * max(np.abs(w).max(), 1), np.abs(x).max())
        assert np.abs(j.T @ (ours_M - w)).max() <= 2e-5 * size
        if set_.ridge > 0:  # type: ignore[attr-defined]
            assert np.abs(ours_M - w).max() <= 1e-6 * max(np.abs(w).max(), 0.1)


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 1.0])
def test_topk_against_the_reference(fraction: float) -> None:
    c = normal(4, 7, seed=3)
    w = TopK(fraction).weights(torch.eye(7).expand(4, 7, 7), c)
    for b in range(4):
        expected = _reference.topk(c[b].numpy(), max(1, round(fraction * 7)))
        assert np.array_equal(w[b].numpy(), expected)


def test_topk_ties_go_to_the_lower_row() -> None:
    w = TopK(0.5).weights(torch.eye(4)[None], torch.ones(1, 4))
    assert w.tolist() == [[0.5, 0.5, 0.0, 0.0]]


# the rows (1,0), (0,1), (1,1) and the target (2, 0.5)
FROZEN = [
    (Mean(), [1 / 3, 1 / 3, 1 / 3]),
    (Target(), [0.0, 0.0, 0.0]),
    (TopK(0.34), [0.0, 0.0, 1.0]),
    (TopK(0.67), [0.5, 0.0, 0.5]),
    (Capped(0.75), [4 / 9, 1 / 9, 4 / 9]),
    (Hull(), [0.5, 0.0, 0.5]),
    (Capped(0.75, 0.1), [4 / 9, 1 / 9, 4 / 9]),
    (Cone(0.1, "zero"), [1.2460815047, 0.0, 0.5877742947]),
    (Cone(0.1), [1.2816091954, 0.0, 0.5919540230]),
    (Span(0.1, "zero"), [1.0607008761, -0.2628285357, 0.7978723404]),
    (Cone(centre="zero"), [1.5, 0.0, 0.5]),
    (Span(centre="zero"), [7 / 6, -1 / 3, 5 / 6]),
    (Span(), [23 / 18, -2 / 9, 13 / 18]),
]


@pytest.mark.parametrize("set_, expected", FROZEN, ids=str)
def test_frozen(set_: FeasibleSet, expected: list[float]) -> None:
    J = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    w = set_.weights(*products(J, torch.tensor([[2.0, 0.5]], dtype=torch.float64)))
    assert np.allclose(w[0].numpy(), expected, rtol=0, atol=2e-5)


def test_not_finite_stays_visible() -> None:
    G, c = products(rows("generic", 3, 5), normal(3, 4, seed=1))
    c[0, 1] = torch.nan
    G[2, 0, 0] = torch.inf
    for set_ in (TopK(0.4), *RIDGED, *BARE):
        w = set_.weights(G, c)
        assert w[[0, 2]].isnan().all() and w[1].isfinite().all()


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, float("nan")])
def test_bad_fraction(value: float) -> None:
    for build in (TopK, Capped):
        with pytest.raises(ValueError, match="fraction is"):
            build(value)


@pytest.mark.parametrize("value", [-1e-9, float("inf"), float("nan")])
def test_bad_ridge(value: float) -> None:
    for build in (Hull, Cone, Span, lambda ridge: Capped(0.5, ridge)):
        with pytest.raises(ValueError, match="ridge is"):
            build(value)


def test_bad_centre() -> None:
    for build in (Cone, Span):
        with pytest.raises(ValueError, match="centre is 'median'"):
            build(0.0, "median")


def test_norm_scale() -> None:
    J = rows("generic", 4, 5, elements=9)
    t = target("outside", J)
    G, c = products(J, t)
    w = Hull().weights(G, c)
    d, t_sq = combine(J, w), (t**2).sum(1)
    for rule, wanted in (("none", d), ("general", J.mean(1)), ("target", t)):
        scaled = norm_scale(rule, G, w, t_sq) * d.norm(dim=1)
        assert torch.allclose(scaled, wanted.norm(dim=1), rtol=1e-12)
        assert torch.equal(norm_scale(rule, G, 0 * w, t_sq), torch.ones(4).double())
        assert torch.equal(norm_scale(rule, 0 * G, w, 0 * t_sq), torch.ones(4).double())
    with pytest.raises(ValueError, match="norm rule is 'unit'"):
        norm_scale("unit", G, w, t_sq)


def test_report() -> None:
    J = rows("generic", 4, 5, elements=9)
    t = target("outside", J)
    G, c = products(J, t)
    w = Cone().weights(G, c)
    d, got = combine(J, w), report(G, c, (t**2).sum(1), w)

    def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:  # of the whole model
        return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)

    assert torch.allclose(got["cos_target"], cosine(d, t))
    assert torch.allclose(got["cos_general"], cosine(J.mean(1), t))
    assert torch.allclose(got["residual"], (d - t).norm() / t.norm())
    even = report(G, c, (t**2).sum(1), Mean().weights(G, c))
    assert torch.allclose(even["effective_rows"], torch.tensor(5.0).double())
    for value in report(0 * G, 0 * c, 0 * c[:, 0], 0 * w).values():
        assert value == 0
