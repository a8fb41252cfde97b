"""The batched quadratic program: feasible, optimal, symmetric, at every scale."""

import pytest
import torch
from _asserts import assert_feasible, assert_near, assert_optimal
from _samplers import KINDS, SCALES, TARGETS, normal, products, rows, target
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dr.projection import kkt_residual, solve_qp, solvers

# upper as a multiple of sum_to / M
SETS = [(None, 1.0), (2.0, 1.0), (1.01, 1.0), (1.0, 1.0), (None, None), (1.0, None)]


def bounds(upper: float | None, count: int) -> float | None:
    return None if upper is None else upper / count


@pytest.mark.parametrize("upper, sum_to", SETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 12])
def test_feasible_and_optimal(
    kind: str, count: int, upper: float | None, sum_to: float | None
) -> None:
    J = rows(kind, 6, count)
    upper = bounds(upper, count)
    rows_and_targets = [(x * J, x * target(t, J)) for t in TARGETS for x in SCALES]
    H, c = products(*(torch.cat(pieces) for pieces in zip(*rows_and_targets, strict=True)))
    w = solve_qp(H, c, upper=upper, sum_to=sum_to)
    assert_feasible(w, upper, sum_to)
    assert_optimal(H, c, w, upper, sum_to)


@pytest.mark.parametrize("upper, sum_to", [(None, 1.0), (2.0, 1.0), (1.01, 1.0), (None, None)])
def test_many_rows(upper: float | None, sum_to: float | None) -> None:
    upper = bounds(upper, 128)
    J = torch.cat([rows(kind, 3, 128) for kind in KINDS])
    H, c = products(J, target("outside", J))
    w = solve_qp(H, c, upper=upper, sum_to=sum_to)
    assert_feasible(w, upper, sum_to)
    assert_optimal(H, c, w, upper, sum_to)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 10),
    elements=st.integers(1, 12),
    upper=st.one_of(st.none(), st.floats(1.0, 12.0)),
    power=st.integers(-6, 6),
)
def test_any_program(seed: int, count: int, elements: int, upper: float | None, power: int) -> None:
    upper = bounds(upper, count)
    J = rows("generic", 4, count, seed=seed, elements=elements)
    H, c = products(J, 10.0**power * normal(4, elements, seed=seed + 1))
    w = solve_qp(H, c, upper=upper, sum_to=1.0)
    assert_feasible(w, upper, 1.0)
    assert_optimal(H, c, w, upper, 1.0)


def test_zero_program_gives_the_centre() -> None:
    H, c = torch.zeros(2, 5, 5), torch.zeros(2, 5)
    assert_near(
        solve_qp(H, c, upper=None, sum_to=1.0), torch.full((2, 5), 0.2, dtype=torch.float64), 1e-12
    )
    assert_near(
        solve_qp(H, c, upper=0.3, sum_to=1.0), torch.full((2, 5), 0.2, dtype=torch.float64), 1e-12
    )
    assert torch.equal(solve_qp(H, c, upper=None, sum_to=None), torch.zeros(2, 5).double())


def test_single_feasible_point_is_exact() -> None:
    H, c = products(rows("generic", 3, 7), normal(3, 5, seed=1))
    w = solve_qp(H, c, upper=1 / 7, sum_to=1.0)
    assert torch.equal(w, torch.full((3, 7), 1 / 7, dtype=torch.float64))


def test_non_finite_block_is_nan_and_alone() -> None:
    H, c = products(rows("generic", 3, 6), normal(3, 5, seed=1))
    clean = solve_qp(H, c, upper=None, sum_to=1.0)
    H[1, 2, 2] = torch.inf
    w = solve_qp(H, c, upper=None, sum_to=1.0)
    assert w[1].isnan().all()
    assert_near(w[[0, 2]], clean[[0, 2]], 1e-12)


@pytest.mark.parametrize("upper, sum_to", SETS)
def test_blocks_in_pieces_are_blocks_at_once(
    upper: float | None, sum_to: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    J = torch.cat([rows(kind, 2, 12) for kind in KINDS])
    H, c = products(J, target("outside", J))
    upper = bounds(upper, 12)
    at_once = solve_qp(H, c, upper=upper, sum_to=sum_to)
    monkeypatch.setattr(solvers, "_CACHE_BYTES", 5 * 8 * 12**2)  # five blocks, five, and two
    assert_near(solve_qp(H, c, upper=upper, sum_to=sum_to), at_once, 1e-6)


@pytest.mark.parametrize("upper, sum_to", SETS)
def test_nothing_waits_for_the_device(upper: float | None, sum_to: float | None) -> None:
    """On the meta device there are no values: reading one on the host raises."""
    H, c = torch.empty(3, 12, 12, device="meta"), torch.empty(3, 12, device="meta")
    assert solve_qp(H, c, upper=bounds(upper, 12), sum_to=sum_to).shape == (3, 12)


def test_no_blocks() -> None:
    w = solve_qp(torch.zeros(0, 4, 4), torch.zeros(0, 4), upper=None, sum_to=1.0)
    assert w.shape == (0, 4)


def test_kkt_residual_sees_a_wrong_answer() -> None:
    J = rows("generic", 4, 6, elements=9)
    H, c = products(J, target("outside", J))
    w = torch.full((4, 6), 1 / 6, dtype=torch.float64)
    assert (kkt_residual(H, c, w, None, 1.0) > 1e-2).all()
    assert (kkt_residual(H, c, w, 1 / 6, 1.0) < 1e-12).all()
    best = solve_qp(H, c, upper=None, sum_to=1.0)
    assert (kkt_residual(H, c, 2 * best, None, 1.0) > 1e-2).all()


def test_program_with_no_feasible_point() -> None:
    with pytest.raises(ValueError, match=r"upper is 0\.1"):
        solve_qp(torch.eye(3)[None], torch.ones(1, 3), upper=0.1, sum_to=1.0)
    with pytest.raises(ValueError, match="sum_to is -1"):
        solve_qp(torch.eye(3)[None], torch.ones(1, 3), upper=None, sum_to=-1.0)
