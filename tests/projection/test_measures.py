"""Lengths, cosines and counts from inner products equal those of the dense gradients."""

import pytest
import torch
from _samplers import SCALES, combine, normal, rows, target
from torch import Tensor

from megatron_dr import projection
from megatron_dr.projection import Cone, gram_of, norm_scale, report_sums, split


def problem(blocks: int = 4, count: int = 5, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """X [B, R, N], the rows and last the target; a direction with t in it; an update."""
    J = rows("generic", blocks, count, seed=seed, elements=9)
    X = torch.cat([J, target("outside", J)[:, None]], 1)
    direction, update = normal(2, blocks, count + 1, seed=seed + 1)
    return X, direction, update


def report(
    gram: Tensor, direction: Tensor, update: Tensor, *, per_block: bool
) -> dict[str, Tensor]:
    """Of every block, or of the model, whose sums are the blocks'."""
    sums = report_sums(gram, direction, update)
    return projection.report(sums if per_block else sums.sum(0))


def cosine(a_BN: Tensor, b_BN: Tensor) -> Tensor:
    return (a_BN * b_BN).sum(1) / (a_BN.norm(dim=1) * b_BN.norm(dim=1))


@pytest.mark.parametrize("scale", SCALES)
def test_norm_scale(scale: float) -> None:
    X, direction, _ = problem()
    gram, d = gram_of(scale * X), combine(X, direction)
    wanted = {"none": d, "general": X[:, :-1].mean(1), "target": X[:, -1]}
    for rule, vector in wanted.items():
        scaled = norm_scale(rule, gram, direction) * d.norm(dim=1)
        assert torch.allclose(scaled, vector.norm(dim=1), rtol=1e-12)


@pytest.mark.parametrize("rule", ["none", "general", "target"])
def test_a_vanishing_direction_is_not_scaled(rule: str) -> None:
    X, direction, _ = problem()
    gram, one = gram_of(X), torch.ones(4).double()
    assert torch.equal(norm_scale(rule, gram, 0 * direction), one)
    assert torch.equal(norm_scale(rule, gram, 1e-9 * direction), one)
    assert torch.equal(norm_scale(rule, 0 * gram, direction), one)
    X[:, 1] = -X[:, 0]  # opposite rows: their sum is rounding
    opposite = torch.zeros_like(direction)
    opposite[:, :2] = 1 / 3
    assert torch.equal(norm_scale(rule, gram_of(X), opposite), one)


def samples(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U [B, M, N], each sample's gradient summed over its tokens; T_i [M]; X [B, R, N] of rows
    g_i = M U_i/T and a target."""
    U = rows("generic", 4, 5, seed=seed, elements=9)
    tokens = torch.tensor([3.0, 1.0, 7.0, 2.0, 12.0], dtype=torch.float64)
    g = 5 * U / tokens.sum()
    return U, tokens, torch.cat([g, target("outside", g)[:, None]], 1)


@pytest.mark.parametrize("seed", range(4))
def test_tokens_rule_gives_the_mean_over_the_chosen_rows_tokens(seed: int) -> None:
    """Whatever multiple of the indicator w is, and in weighted means too; t plays no part."""
    U, tokens, X = samples(seed)
    chosen = (normal(4, 5, seed=seed + 1) > 0).double()
    chosen[:, seed] = 1.0
    direction = torch.cat([normal(4, 1, seed=seed + 2).abs() * chosen, normal(4, 1, seed=9)], 1)
    d = combine(X[:, :-1], direction[:, :-1])
    scale = norm_scale("tokens", gram_of(X), direction, tokens / tokens.sum())
    assert torch.allclose(scale[:, None] * d, combine(U, chosen) / (chosen @ tokens)[:, None])
    w = normal(4, 5, seed=seed + 3).abs()
    scale = norm_scale("tokens", gram_of(X), torch.cat([w, w[:, :1]], 1), tokens / tokens.sum())
    assert torch.allclose(
        scale[:, None] * combine(X[:, :-1], w), combine(U, w) / (w @ tokens)[:, None]
    )


def test_tokens_rule_of_all_rows_is_no_change() -> None:
    _, tokens, X = samples()
    mean = torch.full((4, 6), 1 / 5)
    scale = norm_scale("tokens", gram_of(X), mean, (tokens / tokens.sum()).float())
    assert torch.allclose(scale, torch.ones(4).double(), rtol=1e-6)


def test_tokens_rule_where_no_token_is_chosen() -> None:
    _, tokens, X = samples()
    direction, share = normal(4, 6, seed=1), tokens / tokens.sum()
    direction[0] = 0.0
    direction[1] = -direction[1].abs()
    direction[2, :-1] = torch.tensor([1.0, -1.0, 0.0, -1.0, 0.0])  # 3 - 1 - 2 tokens
    direction[3] = direction[3].abs()
    direction[3, :-1] *= torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    share[2] = 0.0  # a row without a token
    scale = norm_scale("tokens", gram_of(X), direction, share)
    assert torch.equal(scale, torch.ones(4).double())


def test_tokens_rule_of_blocks_with_rows_of_their_own() -> None:
    direction, gram = normal(4, 6, seed=1).abs(), gram_of(samples()[2])
    share_BM = normal(4, 5, seed=2).abs()
    scale = norm_scale("tokens", gram, direction, share_BM)
    each = [norm_scale("tokens", gram[:1], direction[b : b + 1], share_BM[b]) for b in range(4)]
    assert torch.allclose(scale, torch.cat(each), rtol=1e-14)


def test_tokens_rule_needs_shares() -> None:
    with pytest.raises(ValueError, match="share_M"):
        norm_scale("tokens", gram_of(samples()[2]), torch.ones(4, 6))


def test_a_long_target_does_not_make_a_direction_vanish() -> None:
    X, direction, _ = problem()
    direction[:, -1], X[:, -1] = 0.0, 1e7 * X[:, -1]
    wanted = X[:, -1].norm(dim=1) / combine(X, direction).norm(dim=1)
    assert torch.allclose(norm_scale("target", gram_of(X), direction), wanted)


def test_the_cosine_of_a_vanishing_update_is_zero() -> None:
    X, direction, update = problem()
    for per_block in (True, False):
        got = report(gram_of(X), direction, 1e-9 * update, per_block=per_block)
        assert (got["cos_update"] == 0).all()


def test_unknown_rule() -> None:
    X, direction, _ = problem()
    with pytest.raises(ValueError, match="norm rule is 'unit'"):
        norm_scale("unit", gram_of(X), direction)


@pytest.mark.parametrize("scale", SCALES)
def test_report_of_every_block(scale: float) -> None:
    X, direction, update = problem()
    t, d, u = X[:, -1], combine(X, direction), combine(X, update)
    got = report(gram_of(scale * X), direction, update, per_block=True)
    assert all(value.shape == (4,) and value.dtype == torch.float64 for value in got.values())
    assert torch.allclose(got["cos_general"], cosine(X[:, :-1].mean(1), t), rtol=1e-12)
    assert torch.allclose(got["cos_update"], cosine(u, t), rtol=1e-12)
    assert torch.allclose(got["residual"], (d - t).norm(dim=1) / t.norm(dim=1), rtol=1e-12)
    w = direction[:, :-1].abs()
    assert torch.allclose(got["effective_rows"], w.sum(1) ** 2 / (w**2).sum(1))


def test_report_of_the_model_is_of_the_blocks_laid_end_to_end() -> None:
    X, direction, update = problem()
    flat = [x.reshape(1, -1) for x in (X[:, -1], combine(X, direction), combine(X, update))]
    t, d, u = flat
    got = report(gram_of(X), direction, update, per_block=False)
    assert torch.allclose(got["cos_general"], cosine(X[:, :-1].mean(1).reshape(1, -1), t)[0])
    assert torch.allclose(got["cos_update"], cosine(u, t)[0])
    assert torch.allclose(got["residual"], (d - t).norm() / t.norm())
    each = report(gram_of(X), direction, update, per_block=True)
    for name in ("effective_rows", "zero_rows"):
        assert torch.allclose(got[name], each[name].mean())
    assert all(value.shape == () and value.dtype == torch.float64 for value in got.values())


def test_one_block_is_the_model() -> None:
    X, direction, update = problem(blocks=1)
    each = report(gram_of(X), direction, update, per_block=True)
    for name, value in report(gram_of(X), direction, update, per_block=False).items():
        assert torch.equal(value, each[name][0])


def test_effective_and_zero_rows() -> None:
    X, _, update = problem()
    w = torch.tensor([[0.25] * 4 + [0], [1, 0, 0, 0, 0], [-0.5, 0.5, 1e-7, 0, 0], [0] * 5])
    direction = torch.cat([w, torch.ones(4, 1)], 1)
    got = report(gram_of(X), direction, update, per_block=True)
    expected = torch.tensor([4.0, 1.0, 2.0, 0.0], dtype=torch.float64)
    assert torch.allclose(got["effective_rows"], expected, rtol=1e-6)
    assert got["zero_rows"].tolist() == [1, 4, 3, 5]


def test_the_update_of_a_projection_is_never_worse_aligned() -> None:
    """The cone's nearest point to t has the largest cosine of all its directions."""
    J = rows("generic", 4, 5, elements=9)
    gram = gram_of(torch.cat([J, target("in_cone", J)[:, None] + normal(4, 1, 9, seed=7)], 1))
    w = Cone().weights(*split(gram)[:2])
    best = torch.cat([w, torch.zeros(4, 1)], 1)
    for seed in range(20):
        other = torch.cat([normal(4, 5, seed=seed).abs(), torch.zeros(4, 1)], 1)
        pair = [report(gram, best, x, per_block=True)["cos_update"] for x in (other, best)]
        assert (pair[0] <= pair[1] + 1e-9).all()


@pytest.mark.parametrize("per_block", [True, False])
@pytest.mark.parametrize("size", [0.0, 1.0])
def test_zero_gradients_give_zeros(per_block: bool, size: float) -> None:
    gram, direction = torch.zeros(3, 6, 6), torch.full((3, 6), size)
    got = report(gram, direction, direction, per_block=per_block)
    effective, zero = got.pop("effective_rows"), got.pop("zero_rows")
    assert all((value == 0).all() for value in got.values())
    assert (effective == 5 * size).all() and (zero == 5 * (1 - size)).all()


def test_a_gradient_that_is_not_finite_is_never_a_number() -> None:
    X, direction, update = problem()
    X[2, 1, 3] = torch.nan
    direction[2] = torch.nan
    gram = gram_of(X)
    for name, value in report(gram, direction, update, per_block=False).items():
        assert value.isnan(), name
    for name, value in report(gram, direction, update, per_block=True).items():
        assert value.isnan().tolist() == [False, False, True, False], name


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_bad_product_is_never_a_number(value: float) -> None:
    """A row too long for its square, beside products that are fine; and a target that is zero."""
    X, direction, update = problem()
    gram = gram_of(X)
    gram[:, 1, 1] = value
    for per_block in (True, False):
        for name in ("cos_general", "cos_update", "residual"):
            assert report(gram, direction, update, per_block=per_block)[name].isnan().all(), name
    assert not (norm_scale("general", gram, direction).abs() < torch.inf).any()
    X[:, -1], X[:, 0, 0] = 0.0, value
    for name in ("cos_general", "cos_update", "residual"):
        assert report(gram_of(X), direction, update, per_block=False)[name].isnan(), name


def test_infinite_rows_beside_a_finite_direction_are_no_small_ones() -> None:
    """The target alone, as long as the mean row, which is infinite: it is not left as it is."""
    gram = torch.eye(4).double()[None]
    gram[0, 1, 1] = torch.inf
    direction = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    assert not norm_scale("general", gram, direction).isfinite().any()


def test_never_looks_at_a_value() -> None:
    """Tensors without values: whatever would make the host wait for a device fails on them."""
    gram, direction = torch.empty(3, 6, 6, device="meta"), torch.empty(3, 6, device="meta")
    assert norm_scale("general", gram, direction).shape == (3,)
    share = torch.empty(5, device="meta")
    assert norm_scale("tokens", gram, direction, share).shape == (3,)
    assert report(gram, direction, direction, per_block=False)["residual"].shape == ()
