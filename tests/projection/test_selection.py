"""Sets of subset means: against brute force over all subsets, and their theorems."""

import itertools

import _reference
import numpy as np
import pytest
import torch
from _asserts import (
    assert_batch_independent,
    assert_near,
    assert_permutes,
    assert_scale_free,
    assert_symmetric,
)
from _samplers import KINDS, combine, normal, products, rows, target

from megatron_dr.projection import FeasibleSet, Filter, Greedy, Mean, TopK

SETS = [TopK(0.4), Greedy(0.4), Greedy(0.4, 0.1), Filter(0.5), Filter(1.0)]
FRACTIONS = [0.01, 0.3, 0.5, 0.75, 1.0]
DISTINCT = [kind for kind in KINDS if kind != "duplicate_rows"]  # ties would go by rounding


@pytest.mark.parametrize("set_", SETS, ids=str)
@pytest.mark.parametrize("kind", DISTINCT)
def test_scale_free_permutes_and_batches(set_: FeasibleSet, kind: str) -> None:
    J = rows(kind, 5, 10, elements=30)
    t = target("outside", J)
    assert_scale_free(set_, J, t, atol=1e-15)
    assert_permutes(set_, J, t, atol=1e-15)
    assert_batch_independent(set_, J, t, atol=1e-15)


@pytest.mark.parametrize("set_", [*SETS, TopK(1.0), Greedy(1.0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_weights_on_the_rows_kept(set_: FeasibleSet, kind: str) -> None:
    J = rows(kind, 5, 10)
    w = set_.weights(*products(J, target("outside", J)))
    assert w.dtype == torch.float64
    kept = (w > 0).sum(1, keepdim=True)
    assert torch.equal(w, (w > 0).double() / kept.clamp(min=1))
    if not isinstance(set_, Filter):
        assert (kept == max(1, int(set_.fraction * 10))).all()  # type: ignore[attr-defined]


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_topk_is_the_best_subset_to_first_order(fraction: float) -> None:
    c = normal(4, 9, seed=3)
    w = TopK(fraction).weights(torch.eye(9).expand(4, 9, 9), c)
    for b in range(4):
        expected = _reference.topk(c[b].numpy(), max(1, int(fraction * 9)))
        assert np.array_equal(w[b].numpy(), expected)


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("kind", DISTINCT)
def test_greedy_is_greedy_on_the_gradients(kind: str, fraction: float) -> None:
    J = rows(kind, 6, 9, elements=12)
    t = target("outside", J)
    w, k = Greedy(fraction).weights(*products(J, t)), max(1, int(fraction * 9))
    for w_M, j, x in zip(w.numpy(), J.numpy(), t.numpy(), strict=True):
        naive = _reference.greedy(j, x, k)
        assert set(np.flatnonzero(w_M)) == set(naive)
        best = _reference.best_subset(j, x, k)
        error = _reference.subset_error(j, x, naive, k)
        assert error >= _reference.subset_error(j, x, best, k) * (1 - 1e-12)


@pytest.mark.parametrize("step", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("kind", DISTINCT)
def test_greedys_second_order_form_on_gradients(kind: str, fraction: float, step: float) -> None:
    J = rows(kind, 6, 9, elements=12)
    t = target("outside", J)
    w, k = Greedy(fraction, step).weights(*products(J, t)), max(1, int(fraction * 9))
    for w_M, j, x in zip(w.numpy(), J.numpy(), t.numpy(), strict=True):
        naive = _reference.greedy_by_pairs(j, x, k, step)
        assert np.array_equal(w_M, np.isin(np.arange(9), naive) / k)
        found = _reference.pairwise_gain(j, x, naive, step)
        every = itertools.combinations(range(9), k)
        best = max(_reference.pairwise_gain(j, x, subset, step) for subset in every)
        assert found <= best + 1e-12 * abs(best)


def test_greedys_second_order_form_of_shares_of_the_mean() -> None:
    """Rows that are M times as long need a step that is 1/M as long: as with a learning rate."""
    J = rows("generic", 5, 8)
    t = target("outside", J)
    of_rows = Greedy(0.5, 0.3 / 8).weights(*products(J, t))
    assert torch.equal(of_rows, Greedy(0.5, 0.3).weights(*products(J / 8, t)))
    assert not torch.equal(of_rows, Greedy(0.5).weights(*products(J, t)))


def test_greedys_second_order_form_is_topk_in_the_limit_and_on_orthogonal_rows() -> None:
    J = rows("generic", 5, 8)
    t = target("outside", J)
    first_order = TopK(0.5).weights(*products(J, t))
    assert torch.equal(Greedy(0.5, 1e-9).weights(*products(J, t)), first_order)
    assert not torch.equal(Greedy(0.5, 1.0).weights(*products(J, t)), first_order)
    Q, _ = torch.linalg.qr(normal(5, 12, 12, seed=4))
    J = Q[:, :9] * normal(5, 9, 1, seed=5).exp()
    G, c = products(J, target("outside", J))
    for step in (0.1, 10.0):
        assert torch.equal(Greedy(0.5, step).weights(G, c), TopK(0.5).weights(G, c))


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_greedy_on_orthogonal_rows_is_the_best_subset(fraction: float) -> None:
    """Without inner products between rows the gains add up, whatever the rows' lengths."""
    Q, _ = torch.linalg.qr(normal(6, 12, 12, seed=4))
    J = Q[:, :9] * normal(6, 9, 1, seed=5).exp()
    t = target("outside", J)
    w, k = Greedy(fraction).weights(*products(J, t)), max(1, int(fraction * 9))
    for w_M, j, x in zip(w.numpy(), J.numpy(), t.numpy(), strict=True):
        assert tuple(np.flatnonzero(w_M)) == _reference.best_subset(j, x, k)


def test_greedy_prefers_a_new_row_to_a_repeated_one() -> None:
    """Top-k takes the two equal rows."""
    J = torch.tensor([[[2.0, 0.0], [2.0, 0.0], [0.0, 1.5]]], dtype=torch.float64)
    G, c = products(J, torch.tensor([[2.0, 2.0]], dtype=torch.float64))
    assert TopK(0.67).weights(G, c).tolist() == [[0.5, 0.5, 0.0]]
    assert Greedy(0.67).weights(G, c).tolist() == [[0.5, 0.0, 0.5]]


@pytest.mark.parametrize("rows, fraction, k", [(7, 0.5, 3), (3, 0.5, 1), (8, 0.3, 2), (9, 0.1, 1)])
def test_a_share_is_rounded_down_to_whole_rows_and_to_one_at_least(
    rows: int, fraction: float, k: int
) -> None:
    G, c = torch.eye(rows)[None], normal(1, rows, seed=2)
    for set_ in (TopK(fraction), Greedy(fraction), Greedy(fraction, 0.5)):
        assert set_.kept(rows) == k == int((set_.weights(G, c) > 0).sum())


@pytest.mark.parametrize("opposed, fraction, dropped", [(3, 0.5, 1), (1, 0.9, 0), (50, 0.58, 28)])
def test_filter_rounds_what_it_drops_down(opposed: int, fraction: float, dropped: int) -> None:
    """0.58 x 50 is below 29 in float64, as in Python, and 29 in fp32."""
    G, c = torch.eye(opposed + 2)[None], torch.tensor([[-1.0] * opposed + [1.0] * 2])
    w = Filter(fraction).weights(G, c)
    assert int((w == 0).sum()) == dropped == int(fraction * opposed)


def test_ties_go_to_the_lower_row() -> None:
    G, ones = torch.eye(4)[None], torch.ones(1, 4)
    assert TopK(0.5).weights(G, ones).tolist() == [[0.5, 0.5, 0.0, 0.0]]
    assert Greedy(0.5).weights(G, ones).tolist() == [[0.5, 0.5, 0.0, 0.0]]
    assert Greedy(0.5, 1.0).weights(G, ones).tolist() == [[0.5, 0.5, 0.0, 0.0]]
    assert Filter(0.5).weights(G, -ones).tolist() == [[0.5, 0.5, 0.0, 0.0]]


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_filter_against_the_reference(fraction: float) -> None:
    c = normal(6, 9, seed=3) - 0.3
    w = Filter(fraction).weights(torch.eye(9).expand(6, 9, 9), c)
    for b in range(6):
        assert np.allclose(w[b].numpy(), _reference.filtered(c[b].numpy(), fraction), rtol=1e-15)


def test_filter_limits() -> None:
    c = normal(3, 6, seed=1)
    G = torch.eye(6).expand(3, 6, 6)
    assert torch.equal(Filter(0.7).weights(G, c.abs()), Mean().weights(G, c))
    assert torch.equal(Filter(1.0).weights(G, -c.abs()), torch.zeros(3, 6).double())
    c[0, 2] = 0.0  # neither agrees nor opposes
    kept = Filter(1.0).weights(G, c) > 0
    assert torch.equal(kept, c >= 0)


def test_filter_of_all_negatives_never_opposes_the_target() -> None:
    J = rows("generic", 20, 8)
    t = target("outside", J)
    d = combine(J, Filter(1.0).weights(*products(J, t)))
    assert ((d * t).sum(1) >= 0).all()
    for kind in ("outside", "in_hull", "opposite"):
        duplicates = rows("duplicate_rows", 5, 12)
        assert_symmetric(Filter(1.0), duplicates, target(kind, duplicates), atol=1e-15)


def test_all_rows_is_the_mean() -> None:
    J = rows("generic", 3, 7)
    G, c = products(J, target("outside", J))
    for set_ in (TopK(1.0), Greedy(1.0)):
        assert_near(set_.weights(G, c), Mean().weights(G, c), 1e-15)


@pytest.mark.parametrize("set_", SETS, ids=str)
def test_not_finite_stays_visible(set_: FeasibleSet) -> None:
    G, c = products(rows("generic", 4, 5), normal(4, 4, seed=1))
    c[0, 1], G[2, 0, 0], c[3] = torch.nan, torch.inf, -torch.inf
    w = set_.weights(G, c)
    assert w[[0, 2, 3]].isnan().all() and w[1].isfinite().all()


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, float("nan")])
def test_bad_fraction(value: float) -> None:
    for build in (TopK, Greedy, Filter):
        with pytest.raises(ValueError, match="fraction is"):
            build(value)


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_bad_step_length(value: float) -> None:
    with pytest.raises(ValueError, match="step_length is"):
        Greedy(0.5, value)
