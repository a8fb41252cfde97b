"""alpha: the schedules, the statistics against dense vectors, and when the rule is right."""

import itertools

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
    alpha_at,
    alpha_of,
    gram_of,
    norm_scale,
    smoothed,
    split,
    statistics,
)


def test_schedules() -> None:
    assert [alpha_at("constant", 0.3, 0.9, step, 10) for step in (0, 5, 99)] == [0.3] * 3
    for style in ("linear", "cosine"):
        at = [alpha_at(style, 0.8, 0.2, step, 10) for step in (0, 5, 10, 11, 1000)]
        assert at == pytest.approx([0.8, 0.5, 0.2, 0.2, 0.2], abs=1e-15)
        falling = [alpha_at(style, 0.8, 0.2, step, 10) for step in range(11)]
        assert falling == sorted(falling, reverse=True)
    assert alpha_at("linear", 0.0, 1.0, 1, 4) == 0.25
    assert alpha_at("cosine", 0.0, 1.0, 1, 3) == pytest.approx(0.25)


def test_bad_schedules() -> None:
    with pytest.raises(ValueError, match="alpha style is 'step'"):
        alpha_at("step", 0.0, 1.0, 0, 1)
    with pytest.raises(ValueError, match="steps is 0"):
        alpha_at("linear", 0.0, 1.0, 0, 0)


def gram_with_halves(J_BMN: Tensor, a_BN: Tensor, b_BN: Tensor) -> Tensor:
    """The gram of the rows, t and e from the target's halves."""
    return gram_of(torch.cat([J_BMN, (a_BN + b_BN)[:, None] / 2, (a_BN - b_BN)[:, None] / 2], 1))


def halves(blocks: int = 3, count: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    J = rows("generic", blocks, count, elements=9)
    return J, *rows("generic", 2, blocks, seed=5, elements=9)


def direction(
    set_: FeasibleSet, J_BMN: Tensor, half_BN: Tensor, wanted_BN: Tensor | None
) -> Tensor:
    """d [B, N] of one half on some rows, as long as wanted."""
    w = set_.weights(*split(gram_of(torch.cat([J_BMN, half_BN[:, None]], 1)))[:2])
    d = torch.einsum("bm,bmn->bn", w, J_BMN) + set_.target_weight * half_BN
    return d if wanted_BN is None else d * (wanted_BN.norm(dim=1) / d.norm(dim=1))[:, None]


@pytest.mark.parametrize("set_", [Cone(0.3), TopK(0.4), Halfspace()], ids=str)
@pytest.mark.parametrize("norm", ["none", "general", "target"])
@pytest.mark.parametrize("exchangeable", [True, False])
def test_statistics_of_dense_vectors(set_: FeasibleSet, norm: str, exchangeable: bool) -> None:
    J, a, b = halves()
    wanted = {"none": None, "general": J.mean(1), "target": (a + b) / 2}[norm]
    parts = [J[:, 0:6:2], J[:, 1:6:2]] if exchangeable else [J, J]  # the seventh has no partner
    d = {(h, r): direction(set_, parts[r], (a, b)[h], wanted) for h in (0, 1) for r in (0, 1)}
    other, own = {0: b, 1: a}, {0: a, 1: b}
    expected = [
        (a * b).sum(),
        ((a - b) / 2).square().sum(),
        sum((d[h, r] * other[h]).sum() for h, r in d) / 4,
        sum((d[h, r] * own[h]).sum() for h, r in d) / 4,
        ((d[0, 0] * d[1, 1]).sum() + (d[0, 1] * d[1, 0]).sum()) / 2,
        ((d[0, 0] * d[0, 1]).sum() + (d[1, 0] * d[1, 1]).sum()) / 2,
        sum(v.square().sum() for v in d.values()) / 4,
    ]
    got = statistics(set_, norm, gram_with_halves(J, a, b), exchangeable=exchangeable)
    assert torch.allclose(got, torch.stack(expected), rtol=1e-6, atol=1e-6)


def test_a_single_row_is_both_halves() -> None:
    J, a, b = halves(count=1)
    gram = gram_with_halves(J, a, b)
    each = [statistics(Cone(), "none", gram, exchangeable=x) for x in (True, False)]
    assert torch.equal(*each) and each[0].isfinite().all()


def test_never_looks_at_a_value() -> None:
    """Tensors without values: whatever would make the host wait for a device fails on them."""
    gram = torch.empty(2, 6, 6, device="meta")
    new = statistics(Span(0.3), "target", gram, exchangeable=True)
    assert alpha_of(smoothed(smoothed(None, new), new), 0.5).shape == ()


def test_swapping_the_halves_changes_nothing() -> None:
    J, a, b = halves()
    each = [
        statistics(Hull(0.1), "general", gram_with_halves(J, *pair), exchangeable=True)
        for pair in ((a, b), (b, a))
    ]
    assert torch.allclose(*each, rtol=1e-9)


@pytest.mark.parametrize("phi", [0.05, 0.4, 1.0])
def test_alpha_maximises_the_cosine(phi: float) -> None:
    """Of what stays of (1 - x) d + x t with mu, over x in [0, 1], for random moments with a > 0."""
    stays, grid = phi + (1 - phi) / 40, torch.linspace(0, 1, 2001, dtype=torch.float64)
    inner = 0
    for seed in range(50):
        r = 2 * torch.rand(7, generator=generator(seed), dtype=torch.float64)
        noise, worth, own = r[0], r[1], r[1] + r[2]
        cross = worth + stays * (own - worth) / 2
        apart = (worth + r[3]) ** 2 + r[4]
        together, rows_apart = apart + r[5] + r[6], apart + r[5]
        moment = apart + stays * r[5] / 2 + r[6] / 40
        alpha = alpha_of(torch.stack([torch.ones_like(noise), noise, worth, own, apart,
                                      rows_apart, together]), phi)  # fmt: skip

        x = torch.cat([alpha[None], grid])
        square = (1 - x) ** 2 * moment + 2 * x * (1 - x) * cross + x**2 * (1 + stays * noise)
        cosine = ((1 - x) * worth + x) / square.sqrt()
        assert cosine[0] >= cosine.max() - 1e-12
        inner += bool(0 < alpha < 1)
    assert inner > 25


def values(**named: float) -> Tensor:
    """The seven statistics; o = a and D = Y = X unless told."""
    known = {"S": 1.0, "N": 1.0, "a": 0.5, "X": 1.0, **named}
    known = {"o": known["a"], "Y": known["X"], **known}
    known = {"D": known["Y"], **known}
    return torch.tensor([known[k] for k in "SNaoXYD"], dtype=torch.float64)


def test_limits_of_alpha() -> None:
    assert alpha_of(values(N=0.0), 1.0) == 1  # t has no noise
    assert alpha_of(values(a=-0.5), 1.0) == 1  # d opposes mu
    assert alpha_of(values(a=0.0), 1.0) == 1
    assert alpha_of(values(a=-9.0), 1.0) == 1
    assert alpha_of(values(S=-0.1), 1.0) == 0  # t is noise, d is not
    assert alpha_of(values(S=0.0), 1.0) == 0
    assert alpha_of(values(X=0.2), 1.0) == 0  # d is mu itself
    assert alpha_of(values(S=-0.1, a=-0.5), 1.0) == 0  # nothing is known
    assert alpha_of(values(S=-0.1, a=-0.5, o=9.0), 1.0) == 0
    assert alpha_of(torch.zeros(7), 1.0) == 0
    assert alpha_of(values(o=2.5, X=0.5), 1.0) == 1  # d is t/2: it has half of t's noise
    assert alpha_of(values(), 1.0) == 0.6  # beta = 0.5, gamma = 1 - 0.25


def test_less_persistent_noise_means_more_of_the_target() -> None:
    alphas = [float(alpha_of(values(o=0.8), phi)) for phi in (1.0, 0.5, 0.1, 0.01)]
    assert alphas == sorted(alphas) and alphas[0] < 0.7 and alphas[-1] > 0.9


def test_smoothing() -> None:
    first, second = values(), values(S=3.0)
    state = smoothed(None, first)
    assert torch.equal(alpha_of(state, 0.7), alpha_of(first, 0.7))
    state = smoothed(state, second)
    assert torch.allclose(state, 0.09 * first + 0.1 * second)
    for bad in (torch.nan, torch.inf):
        assert torch.equal(smoothed(state, values(a=bad)), state)
    assert torch.equal(smoothed(None, values(a=torch.nan)), torch.zeros(7).double())


class Run:
    """Steps of a training run with mu known and the same finite target set throughout.

    A share of each step's rows points to q mu + bias, the rest anywhere; all are noisy.
    """

    def __init__(
        self, *, noise: float, size: int, useful: float, q: float = 1.0, bias: float = 0.0,
        row_noise: float = 4.0, steps: int = 30, count: int = 12, seed: int = 0,
    ) -> None:  # fmt: skip
        g = generator(seed)

        def draw(*shape: int) -> Tensor:  # unit vectors, nearly
            return torch.randn(*shape, 500, generator=g, dtype=torch.float64) / 500**0.5

        self.mu = draw() / draw().norm()
        batches = torch.stack([torch.randperm(size, generator=g)[:8] for _ in range(steps)])
        samples = (self.mu + noise * draw(size))[batches]
        self.a, self.b = samples[:, :4].mean(1), samples[:, 4:].mean(1)
        self.t, self.phi, kept = (self.a + self.b) / 2, 8 / size, round(useful * count)
        clear = (q * self.mu + bias * draw()).expand(steps, kept, -1)
        J = torch.cat([clear, draw(steps, count - kept)], 1)[:, torch.randperm(count, generator=g)]
        self.J = J + row_noise * draw(steps, count)
        self.gram = gram_with_halves(self.J, self.a, self.b)

    def alphas(self, set_: FeasibleSet, norm: str) -> Tensor:
        """alpha of every step, from the steps so far."""
        state, alphas = None, []
        for gram in self.gram:
            state = smoothed(state, statistics(set_, norm, gram[None], exchangeable=True))
            alphas.append(alpha_of(state, self.phi))
        return torch.stack(alphas)

    def regret(self, set_: FeasibleSet, norm: str) -> float:
        """How much larger the best fixed alpha makes cos(sum of u, mu)."""
        gram = gram_of(torch.cat([self.J, self.t[:, None]], 1))
        w = set_.weights(*split(gram)[:2])
        scale = norm_scale(norm, gram, torch.cat([w, torch.zeros_like(w[:, :1])], 1))
        d = torch.einsum("t,tm,tmn->tn", scale, w, self.J)

        def cosine(alpha: Tensor) -> float:
            total = ((1 - alpha)[:, None] * d + alpha[:, None] * self.t).sum(0)
            return float(total @ self.mu / total.norm() / self.mu.norm())

        fixed = [cosine(torch.full((len(d),), x / 50)) for x in range(51)]
        return max(fixed) - cosine(self.alphas(set_, norm))


@pytest.mark.parametrize("norm", ["none", "general", "target"])
def test_scaling_all_gradients_leaves_alpha(norm: str) -> None:
    gram = Run(noise=2.0, size=16, useful=0.5, steps=3).gram
    alphas = [
        alpha_of(statistics(Cone(0.3), norm, scale**2 * gram, exchangeable=True), 0.5)
        for scale in SCALES
    ]
    assert 0.05 < alphas[1] < 0.95
    assert torch.allclose(torch.stack(alphas), alphas[1], rtol=1e-6)


def test_the_rule_nears_the_best_fixed_alpha() -> None:
    """Over targets good and bad, sets small and large, rows that help, also mislead, or neither."""
    worlds = itertools.product((1.0, 10.0), (8, 64), ((0.5, 1.0, 0.0), (1.0, 0.5, 1.0), (0, 0, 0)))
    regrets = []
    for noise, size, (useful, q, bias) in worlds:
        run = Run(noise=noise, size=size, useful=useful, q=q, bias=bias)
        regrets += [run.regret(TopK(0.25), "none"), run.regret(Span(0.3), "target")]
    assert sum(regrets) / len(regrets) < 0.02
    assert max(regrets) < 0.06


@pytest.mark.parametrize("set_", [TopK(0.5), Mean(), Span(0.3)], ids=str)
def test_alpha_in_clear_cases(set_: FeasibleSet) -> None:
    exact = Run(noise=0.0, size=8, useful=0.5, steps=5)
    assert (exact.alphas(set_, "general") == 1).all()
    unrelated = Run(noise=1.0, size=8, useful=0.0, steps=15)
    assert unrelated.alphas(set_, "general")[-1] > 0.9
    noisy = Run(noise=30.0, size=8, useful=1.0, steps=15)
    assert noisy.alphas(set_, "general")[-1] < 0.2
