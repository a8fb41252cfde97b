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
    Ball,
    Capped,
    Cone,
    FeasibleSet,
    Filter,
    Greedy,
    Halfspace,
    Hull,
    Mean,
    Span,
    Target,
    TopK,
)

RIDGED = [Capped(0.5, 1e-3), Hull(1e-3), Cone(1e-3), Span(1e-3), Ball(0.5, 1e-3)]
BARE = [Capped(0.5), Hull(), Cone(), Span(), Ball(0.5)]
SETS = [Mean(), Target(), Halfspace(), *RIDGED, *BARE]


@pytest.mark.parametrize("set_", SETS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_finite_and_scale_free(set_: FeasibleSet, kind: str) -> None:
    J = rows(kind, 5, 10)
    # without a ridge, singular programs determine d; w only as far as the solver's tiny pull
    loose = set_ in BARE and (kind != "generic" or isinstance(set_, Span | Ball))
    assert_scale_free(set_, J, target("outside", J), atol=1e-3 if loose else 1e-6)


@pytest.mark.parametrize("set_", SETS, ids=str)
@pytest.mark.parametrize("kind", ["generic", "zero_row", "common"])
def test_permutes_and_batches(set_: FeasibleSet, kind: str) -> None:
    J = rows(kind, 2, 10, elements=30)
    t = target("outside", J)
    assert_permutes(set_, J, t, atol=1e-6)
    assert_batch_independent(set_, J, t, atol=1e-6)


@pytest.mark.parametrize("set_", [*RIDGED, *BARE, Mean(), Halfspace()], ids=str)
def test_duplicate_rows_share(set_: FeasibleSet) -> None:
    J = rows("duplicate_rows", 5, 12)
    for kind in ("outside", "in_hull", "opposite"):
        assert_symmetric(set_, J, target(kind, J), atol=1e-5)


@pytest.mark.parametrize("set_", SETS, ids=str)
def test_zero_rows_everywhere(set_: FeasibleSet) -> None:
    w = set_.weights(torch.zeros(2, 4, 4), torch.zeros(2, 4))
    assert w.dtype == torch.float64 and w.isfinite().all()
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
        (Ball(1e4), "in_span"),
        (Ball(1e4), "in_hull"),
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
    hulls = [Mean(), Capped(0.7), Capped(0.4), Hull(), Cone(), Span()]
    for chain in (hulls, [Ball(0.0), Ball(0.1), Ball(1.0), Ball(10.0), Span()]):
        distance = [(combine(J, s.weights(G, c)) - t).norm(dim=1) for s in chain]
        for small, large in zip(distance, distance[1:], strict=False):
            assert (large <= small * (1 + 1e-9)).all()


def test_how_much_of_the_target_is_in_d() -> None:
    assert [s for s in [*SETS, TopK(0.5), Greedy(0.5), Filter(0.5)] if s.target_weight] == [
        Target(),
        Halfspace(),
    ]
    assert Target.target_weight == Halfspace.target_weight == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_halfspace_is_the_projection(kind: str) -> None:
    """Of t itself, in the space of the elements: never against the mean, no further than needed."""
    J = torch.cat([rows(kind, 4, 7)] * 2)
    t = torch.cat([target(x, J[:4]) for x in ("outside", "opposite")])
    w = Halfspace().weights(*products(J, t))
    d, mean = combine(J, w) + t, J.mean(1)
    size = t.norm(dim=1)
    for d_N, j, x, s in zip(d.numpy(), J.numpy(), t.numpy(), size.numpy(), strict=True):
        assert np.abs(d_N - _reference.halfspace(j, x)).max() <= 1e-9 * s
    assert ((d * mean).sum(1) >= -1e-9 * size * mean.norm(dim=1)).all()
    assert (d[4:].norm(dim=1) <= 1e-9 * size[4:]).all()  # t = -mean is removed whole


def test_halfspace_leaves_a_target_that_agrees_alone() -> None:
    """By +0.0: an update's -0.0 would only be read as a sign."""
    J = rows("generic", 3, 4)
    w = Halfspace().weights(*products(J, J.mean(1)))
    assert torch.equal(w, torch.zeros(3, 4).double()) and not w.signbit().any()


def test_halfspace_without_a_mean_is_the_target() -> None:
    J = rows("generic", 3, 4)
    J[:, 2:] = -J[:, :2]
    w = Halfspace().weights(*products(J, target("outside", J)))
    assert torch.equal(w, torch.zeros(3, 4).double())


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
    for set_ in (Mean(), TopK(0.3), Greedy(0.3), Capped(0.5), Hull(), Capped(1.0)):
        assert torch.equal(set_.weights(G, c), torch.ones(2, 1).double())
    assert (Cone().weights(G, c) - torch.tensor([[2.0], [0.0]])).abs().max() < 1e-6
    assert (Span().weights(G, c) - torch.tensor([[2.0], [-1.0]])).abs().max() < 1e-9
    assert (Ball(0.5).weights(G, c) - torch.tensor([[1.5], [0.5]])).abs().max() < 1e-9
    assert Halfspace().weights(G, c).tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_reference(kind: str, ridge: float) -> None:
    J = rows(kind, 2, 5)
    J = torch.cat([J, J, J, J])
    t = torch.cat([target(k, J[:2]) for k in ("outside", "in_hull", "in_cone", "opposite")])
    compare(Capped(0.5, ridge), J, t, lambda j, x: _reference.capped(j, x, 0.4, ridge))
    compare(Hull(ridge), J, t, lambda j, x: _reference.capped(j, x, 1.0, ridge))
    compare(Cone(ridge), J, t, lambda j, x: _reference.cone(j, x, ridge))
    compare(Ball(0.5, ridge), J, t, lambda j, x: _reference.ball(j, x, 0.5, ridge))
    compare(Span(ridge), J, t, lambda j, x: _reference.span(j, x, ridge))


def compare(
    set_: FeasibleSet, J: Tensor, t: Tensor, solve: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> None:
    """The update always; the weights too where a ridge makes them unique."""
    ours = set_.weights(*products(J, t)).numpy()
    for ours_M, j, x in zip(ours, J.numpy(), t.numpy(), strict=True):
        w = solve(j, x)
        size = max(np.abs(j).max() * max(np.abs(w).max(), 1), np.abs(x).max())
        assert np.abs(j.T @ (ours_M - w)).max() <= 2e-5 * size
        if set_.ridge > 0:  # type: ignore[attr-defined]
            assert np.abs(ours_M - w).max() <= 1e-6 * max(np.abs(w).max(), 0.1)


# the rows (1,0), (0,1), (1,1) and the target (2, 0.5)
FROZEN = [
    (Mean(), [1 / 3, 1 / 3, 1 / 3]),
    (Target(), [0.0, 0.0, 0.0]),
    (TopK(0.34), [0.0, 0.0, 1.0]),
    (TopK(0.67), [0.5, 0.0, 0.5]),
    (Greedy(0.34), [1.0, 0.0, 0.0]),
    (Greedy(0.67), [0.5, 0.0, 0.5]),
    (Filter(1.0), [1 / 3, 1 / 3, 1 / 3]),
    (Halfspace(), [0.0, 0.0, 0.0]),
    (Ball(0.5), [0.6646662, 0.1384317, 0.4697646]),
    (Capped(0.75), [4 / 9, 1 / 9, 4 / 9]),
    (Hull(), [0.5, 0.0, 0.5]),
    (Capped(0.75, 0.1), [4 / 9, 1 / 9, 4 / 9]),
    (Cone(0.1), [1.2816091954, 0.0, 0.5919540230]),
    (Cone(), [1.5, 0.0, 0.5]),
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
    for set_ in (Halfspace(), *RIDGED, *BARE):
        w = set_.weights(G, c)
        assert w[[0, 2]].isnan().all() and w[1].isfinite().all()


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, float("nan")])
def test_bad_fraction(value: float) -> None:
    with pytest.raises(ValueError, match="fraction is"):
        Capped(value)


@pytest.mark.parametrize("value", [-1e-9, float("inf"), float("nan")])
def test_bad_ridge(value: float) -> None:
    for build in (Hull, Cone, Span, lambda r: Capped(0.5, r), lambda r: Ball(0.5, r)):
        with pytest.raises(ValueError, match="ridge is"):
            build(value)
    with pytest.raises(ValueError, match="radius is"):
        Ball(value)


@pytest.mark.parametrize(
    "set_",
    [Mean(), Target(), TopK(0.4), Greedy(0.4), Filter(0.4), Span(), Span(1e-3), Ball(0.5),
     Ball(0.5, 1e-3), Halfspace()],
    ids=str,
)  # fmt: skip
def test_never_looks_at_a_value(set_: FeasibleSet) -> None:
    """Tensors without values: whatever would make the host wait for a device fails on them."""
    gram = torch.empty(2, 6, 6, device="meta")
    w = set_.weights(gram[:, :5, :5], gram[:, :5, 5])
    assert w.shape == (2, 5) and w.dtype == torch.float64
