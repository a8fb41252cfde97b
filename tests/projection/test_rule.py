"""The rule `auto`: its statistics against dense vectors, its choice against brute force."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from _samplers import SCALES, generator, rows
from torch import Tensor

from megatron_dr.projection import (
    Cone,
    FeasibleSet,
    Halfspace,
    Hull,
    Mean,
    Span,
    TopK,
    gram_of,
    norm_scale,
    project,
    rule,
    split,
)

SETS = [Cone(0.3), TopK(0.4), Halfspace()]
NORMS = ["none", "general", "target"]


def gram_with_halves(J_BMN: Tensor, a_BN: Tensor, b_BN: Tensor) -> Tensor:
    """The gram of the rows, t and e from the target's halves."""
    return gram_of(torch.cat([J_BMN, (a_BN + b_BN)[:, None] / 2, (a_BN - b_BN)[:, None] / 2], 1))


def halves(count: int = 7, seed: int = 5, blocks: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    J = rows("generic", blocks, count, elements=9, seed=seed - 5)
    both = rows("generic", 2, blocks, seed=seed, elements=9)
    return J, both[0] + 0.5 * J.mean(1), both[1] + 0.5 * both[0]


def direction(
    set_: FeasibleSet, J_BMN: Tensor, half_BN: Tensor, wanted_BN: Tensor | None
) -> Tensor:
    """d [B, N] of one half, as long as wanted."""
    w = set_.weights(*split(gram_of(torch.cat([J_BMN, half_BN[:, None]], 1)))[:2])
    d = torch.einsum("bm,bmn->bn", w, J_BMN) + set_.target_weight * half_BN
    return d if wanted_BN is None else d * (wanted_BN.norm(dim=1) / d.norm(dim=1))[:, None]


def dense(set_: FeasibleSet, norm: str, J: Tensor, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """g, d, t, the mean row and the halves' projections, all blocks in one vector."""
    t, mean = (a + b) / 2, J.mean(1)
    wanted = {"none": None, "general": mean, "target": t}[norm]
    g = mean if norm != "target" else mean * (t.norm(dim=1) / mean.norm(dim=1))[:, None]
    d, d_A, d_B = (direction(set_, J, x, wanted) for x in (t, a, b))
    named = {"g": g, "d": d, "t": t, "mean": mean, "d_A": d_A, "d_B": d_B, "A": a, "B": b}
    return {name: vector.flatten() for name, vector in named.items()}


@pytest.mark.parametrize("set_", SETS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_what_is_seen_of_dense_vectors(set_: FeasibleSet, norm: str) -> None:
    J, a, b = halves()
    v, found = dense(set_, norm, J, a, b), rule.seen(set_, norm, gram_with_halves(J, a, b))
    unit = torch.stack([v[name] / v[name].norm() for name in ("g", "d", "t", "mean")])
    assert torch.allclose(found.cosine_44, unit @ unit.T, rtol=1e-6, atol=1e-6)
    lengths = torch.stack([v[name].norm() for name in "gdt"])
    assert torch.allclose(found.length_3, lengths, rtol=1e-6)
    gain = (v["d_A"] @ v["B"] / v["d_A"].norm() + v["d_B"] @ v["A"] / v["d_B"].norm()) / 2
    assert found.worth == pytest.approx(float(gain / v["t"].norm()), rel=1e-5)
    agreement = v["A"] @ v["B"] / v["t"].square().sum()
    assert found.agreement == pytest.approx(float(agreement), rel=1e-6)
    gram = gram_with_halves(J, a, b)[:, :-1, :-1]
    assert torch.allclose(found.weights_BM, set_.weights(*split(gram)[:2]), atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_where_a_half_or_all_of_the_target_vanishes(norm: str) -> None:
    for count, set_ in ((1, Cone()), (5, TopK(0.4))):
        J, a, b = halves(count=count)
        for gram in (gram_with_halves(J, 0 * a, b), gram_with_halves(J, 0 * a, 0 * b)):
            found = rule.seen(set_, norm, gram)
            choice = rule.chosen(rule.gathered(None, found), found, 5.0, 0.5)
            assert found.finite and all(x.isfinite() for x in rule.shares(choice, found))


def test_a_projection_of_nothing_is_nothing() -> None:
    """A cone of rows that all oppose t, without a ridge: d is rounding, and no direction."""
    J, a, b = halves()
    J = J.abs()
    found = rule.seen(Cone(), "general", gram_with_halves(J, -a.abs(), -b.abs()))
    assert found.length_3[1] == 0 and found.worth == 0 and (found.cosine_44[1] == 0).all()


def test_never_looks_at_a_value() -> None:
    """Tensors without values: whatever would make the host wait for a device fails on them."""
    gram = torch.empty(2, 6, 6, device="meta")
    found = rule.seen(Span(0.3), "target", gram)
    state = rule.gathered(rule.gathered(None, found), found)
    choice = rule.chosen(state, found, 5.0, 0.5)
    assert rule.worn(state, choice, found, 0.5).shape == (rule.STATE,)
    assert all(x.shape == () for x in rule.shares(choice, found))


def test_swapping_the_halves_changes_nothing() -> None:
    J, a, b = halves()
    one, other = (
        rule.seen(Hull(0.1), "general", gram_with_halves(J, *x)) for x in ((a, b), (b, a))
    )
    assert torch.allclose(one.worth, other.worth, rtol=1e-9)
    assert torch.allclose(one.cosine_44, other.cosine_44, rtol=1e-9)
    assert torch.allclose(one.agreement, other.agreement, rtol=1e-9)


def test_one_block_cut_in_two_is_the_same_model() -> None:
    """Grams of blocks are summed: with the weights of one set that sees both (the mean)."""
    J, a, b = halves(blocks=1)
    cut = [torch.stack([x[0, ..., :4], x[0, ..., 4:8]]) for x in (J, a, b)]
    whole = [x[..., :8] for x in (J, a, b)]
    one, two = (rule.seen(Mean(), "none", gram_with_halves(*x)) for x in (whole, cut))
    for name in ("cosine_44", "length_3", "worth", "agreement"):
        assert torch.allclose(getattr(one, name), getattr(two, name), rtol=1e-9), name


# -- the choice ----------------------------------------------------------------------------------
def state_of(
    weight: float, D: float, gd: float, gt: float, dt: float, m: float, agreement: float = 1.0
) -> Tensor:
    """As after steps that all saw the same; m without its prior's part."""
    averages = [weight, *(weight * x for x in (D, gd, gt, dt)), agreement]
    return torch.tensor([*averages, 16 * m - 0.4 * 16 + 16 * m, 16.0, 0.0], dtype=torch.float64)


def seen_of(seed: int, norm: str = "general", count: int = 6) -> rule.Seen:
    J, a, b = halves(count, 5 + seed)
    return rule.seen(Cone(0.3), norm, gram_with_halves(J, a, b))


def by_hand(state: list[float], passes: float, now: Tensor, floor: float) -> tuple[float, float]:
    """The choice as the docstring says it, in plain numbers."""
    weight, D, gd, gt, dt = state[0], *(x / state[0] for x in state[1:5])
    D, m = max(D, 0.0), max(min((6.4 + state[6]) / (16 + state[7]), state[5]), 0.0)
    (_, gd_, gt_, gk), (_, _, dt_, dk), (*_, tk), _ = now.tolist()
    found = []
    for i, j in itertools.product(range(21), range(5)):
        r, beta = i / 20, j / 4
        g_, d_ = (1 - r) * beta, (1 - r) * (1 - beta)
        square = g_ * g_ + d_ * d_ + r * r + 2 * (g_ * d_ * gd + g_ * r * gt + d_ * r * dt)
        length = math.sqrt(max(square, 1e-12))
        wear = r / length * passes / (2 * 5.0)
        gain = (r * m * (1 - wear) + (1 - r) * (beta * gt + (1 - beta) * D)) / length
        square = g_ * g_ + d_ * d_ + r * r + 2 * (g_ * d_ * gd_ + g_ * r * gt_ + d_ * r * dt_)
        keeps = (g_ * gk + d_ * dk + r * tk) / math.sqrt(max(square, 1e-12))
        found.append((gain, (g_ + d_ * gd + r * gt) / length, r, beta, keeps))
    least = min(floor, max(x[4] for x in found)) - 1e-12
    found = [x for x in found if floor == 0 or x[4] >= least]
    best = max(found, key=lambda x: x[0])
    near = [x for x in found if x[0] >= best[0] - 0.1 * abs(best[0]) and x[2] >= best[2] / 2]
    r = max(near, key=lambda x: x[1])[2]
    near = [x for x in found if x[0] >= best[0] - 0.25 * abs(best[0]) and x[2] == r]
    assert weight > 0
    return r, max(x[3] for x in near)


@pytest.mark.parametrize("floor", [0.0, 0.6, 0.95])
def test_the_choice_is_that_of_brute_force(floor: float) -> None:
    different = set()
    for seed in range(60):
        x = torch.rand(7, generator=generator(seed), dtype=torch.float64).tolist()
        state = state_of(0.5, 0.6 * x[0] - 0.1, 0.8 * x[1], 0.5 * x[2], 0.9 * x[3], x[4], x[6])
        passes, now = 30.0 * x[5] ** 2, seen_of(seed)
        found = rule.chosen(state, now, passes, floor)
        expected = by_hand(state.tolist(), passes, now.cosine_44, floor)
        assert (float(found.r), float(found.beta)) == expected
        assert float(found.m) == pytest.approx(min(x[4], x[6])) and float(found.D) >= 0
        different.add(expected)
    assert len(different) > (8 if floor < 0.9 else 1)


def test_limits_of_the_choice() -> None:
    now = seen_of(0)

    def at(D: float, gt: float, m: float, passes: float) -> tuple[float, float]:
        """d, g and t at right angles."""
        choice = rule.chosen(state_of(1.0, D, 0.0, gt, 0.0, m), now, passes)
        return float(choice.r), float(choice.beta)

    assert at(0.0, 0.0, 0.9, 0.1)[0] >= 0.7  # t alone is worth something, and new
    assert at(0.5, 0.0, 0.0, 5.0) == (0.0, 0.25)  # d alone: g comes in while it costs little
    assert at(0.0, 0.5, 0.0, 5.0) == (0.0, 1.0)
    assert at(0.5, 0.0, 0.9, 1e9)[0] == 0.0  # never ends: t would only be learnt by heart
    rs = [at(0.2, 0.0, 0.9, passes)[0] for passes in (0.1, 6.0, 20.0, 100.0)]
    assert rs == sorted(rs, reverse=True) and rs[0] > rs[2] > rs[3]


@pytest.mark.parametrize("norm", NORMS)
def test_scaling_all_gradients_leaves_the_choice(norm: str) -> None:
    """And so everything that a checkpoint keeps: it has no unit."""
    gram = gram_with_halves(*(x.double() for x in halves()))
    found = [rule.seen(Cone(0.3), norm, scale**2 * gram) for scale in SCALES]
    states = [rule.gathered(None, one) for one in found]
    for state, one in zip(states, found, strict=True):
        assert torch.allclose(state, states[1], rtol=1e-6)
        choice, other = rule.chosen(state, one, 9.0), rule.chosen(states[1], found[1], 9.0)
        assert (choice.r, choice.beta) == (other.r, other.beta) and 0 < choice.r < 1
        assert torch.allclose(
            torch.stack(rule.shares(choice, one)), torch.stack(rule.shares(other, found[1]))
        )


# -- the averages --------------------------------------------------------------------------------
def test_averages_begin_without_a_bias() -> None:
    first, second = seen_of(1), seen_of(2)
    state = rule.gathered(None, first)
    choice = rule.chosen(state, first, 1.0)
    assert float(choice.G) == pytest.approx(float(first.cosine_44[0, 2]))
    agreed = float(first.agreement)
    assert float(choice.m) == max(min((6.4 + agreed) / 17, 0.95 * 0.4 + 0.05 * agreed), 0)
    both = rule.chosen(rule.gathered(state, second), second, 1.0)
    old, new = float(first.cosine_44[0, 2]), float(second.cosine_44[0, 2])
    assert float(both.G) == pytest.approx((0.95 * old + new) / 1.95)


def test_only_the_first_pass_says_what_the_target_is_worth() -> None:
    one = seen_of(1)
    state = rule.gathered(None, one)
    state[-1] = 0.999
    state = rule.gathered(state, one)
    state[-1] = 1.0
    assert torch.equal(rule.gathered(state, one)[6:8], state[6:8]) and state[7] == 2


def test_the_target_is_worth_no_more_than_its_halves_agree() -> None:
    """Agreement that fades over the run takes the target's share with it."""
    one = seen_of(1)
    fading = [replace(one, agreement=one.agreement * 0.0 + 0.9**step) for step in range(60)]
    state, found = rule.blank(one.worth), []
    for seen in fading:
        state = rule.gathered(state, seen)
        state[-1] = 1.0
        found.append(rule.chosen(state, seen, 5.0))
    ms = [float(choice.m) for choice in found]
    assert max(ms) < 0.45 and ms[-1] < 0.1 and found[-1].r < found[0].r


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_is_left_out(bad: float) -> None:
    gram = gram_with_halves(*halves())
    good = rule.seen(Cone(0.3), "general", gram)
    state = rule.gathered(None, good)
    gram[1, 2] = gram[1, :, 2] = bad
    worse = rule.seen(Cone(0.3), "general", gram)
    assert torch.equal(rule.gathered(state, worse), state)
    choice = rule.chosen(state, worse, 5.0)
    assert torch.equal(rule.worn(state, choice, worse, 1.0), state)
    assert torch.equal(rule.gathered(None, worse), rule.blank(good.worth))


def test_a_step_wears_by_its_part_of_the_length() -> None:
    one = seen_of(3)
    state = rule.gathered(None, one)
    for r, beta in ((1.0, 0.0), (0.3, 0.5), (0.0, 1.0)):
        choice = rule.Choice(*(torch.tensor(x).double() for x in (r, beta, 0.0, 0.0, 0.0)))
        v = torch.tensor([(1 - r) * beta, (1 - r) * (1 - beta), r]).double()
        length = (v @ one.cosine_44[:3, :3] @ v).sqrt()
        after = rule.worn(state, choice, one, 0.25)
        assert float(after[-1]) == pytest.approx(0.25 * r / float(length))
        assert torch.equal(after[:-1], state[:-1])


# -- the update ----------------------------------------------------------------------------------
@pytest.mark.parametrize("set_", SETS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_the_update_is_the_mix_of_unit_vectors(set_: FeasibleSet, norm: str) -> None:
    J, a, b = halves()
    v, gram = dense(set_, norm, J, a, b), gram_with_halves(J, a, b)
    found = rule.seen(set_, norm, gram)
    for r, beta in itertools.product((0.0, 0.3, 1.0), (0.0, 0.25, 1.0)):
        choice = rule.Choice(*(torch.tensor(x).double() for x in (r, beta, 0.0, 0.0, 0.0)))
        alpha, b_ = rule.shares(choice, found)
        update = project(gram[:, :-1, :-1], set_, norm, alpha, None, found.weights_BM, b_)
        X = torch.cat([J, ((a + b) / 2)[:, None]], 1)
        u = torch.einsum("br,brn->bn", update.update_BR, X).flatten()
        t, g, d = (v[name] / v[name].norm() for name in "tgd")
        mixed = r * t + (1 - r) * (beta * g + (1 - beta) * d)
        by = r / v["t"].norm() + (1 - r) * (beta / v["g"].norm() + (1 - beta) / v["d"].norm())
        assert torch.allclose(u, mixed / by, rtol=1e-5, atol=1e-6)
        if r == 1:  # the target alone
            assert torch.allclose(u, v["t"])
        if beta == 1:  # a plain mix
            assert torch.allclose(u, (1 - alpha) * v["g"] + alpha * v["t"])
        if norm != "none":
            assert float(b_) == pytest.approx(beta, abs=1e-9)


@pytest.mark.parametrize("floor", [0.2, 0.7, 0.99, 1.0])
@pytest.mark.parametrize("set_", [*SETS, Span(0.3)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_the_floor_holds_whenever_it_can(set_: FeasibleSet, norm: str, floor: float) -> None:
    """cos(u, mean row) >= k: in one block always, as u may be the mean itself; of several blocks
    with the norm `target` wherever any candidate has it."""
    held = 0
    for seed, blocks in itertools.product(range(8), (1, 3)):
        J, a, b = halves(seed=5 + seed, blocks=blocks)
        gram = gram_with_halves(J, a - 2 * J.mean(1), b)  # a target that opposes the mean
        found = rule.seen(set_, norm, gram)
        wanted = torch.tensor([1.0, 0.1, 0, 0, 0, 0.4, 0, 0, 0], dtype=torch.float64)
        choice = rule.chosen(wanted, found, 1.0, floor)
        alpha, beta = rule.shares(choice, found)
        update = project(gram[:, :-1, :-1], set_, norm, alpha, None, found.weights_BM, beta)
        X = torch.cat([J, ((a + b) / 2 - J.mean(1))[:, None]], 1)
        u = torch.einsum("br,brn->bn", update.update_BR, X).flatten()
        cosine = torch.nn.functional.cosine_similarity(u, J.mean(1).flatten(), dim=0)
        free = rule.chosen(wanted, found, 1.0)
        held += bool((free.r, free.beta) != (choice.r, choice.beta))
        if blocks == 1 or norm != "target":
            assert cosine >= floor - 1e-6
        else:
            assert cosine >= floor - 1e-6 or (choice.r, choice.beta) == (0.0, 1.0) or floor > 0.7
    assert held > 4


def test_the_mean_as_the_set_is_a_mix() -> None:
    """d is g, so beta has no meaning and the update is general data and target alone."""
    J, a, b = halves()
    gram = gram_with_halves(J, a, b)
    found = rule.seen(Mean(), "general", gram)
    assert torch.allclose(found.cosine_44[0], found.cosine_44[1])
    choice = rule.chosen(rule.gathered(None, found), found, 3.0)
    alpha, beta = rule.shares(choice, found)
    u = project(gram[:, :-1, :-1], Mean(), "general", alpha, beta=beta).update_BR
    assert torch.allclose(u[:, :-1], ((1 - alpha) / 7).expand(3, 7))
    assert norm_scale("general", gram[:, :-1, :-1], u).isfinite().all()
