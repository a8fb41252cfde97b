"""alpha: the schedules, the statistics against dense vectors, and when the rule is right."""

import pytest
import torch
from _samplers import SCALES, generator, rows
from torch import Tensor

from megatron_dr.projection import (
    Cone,
    FeasibleSet,
    Halfspace,
    Hull,
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


PASSES = 6.0  # in which the rule's world learns a sample by heart


def gram_with_halves(J_BMN: Tensor, a_BN: Tensor, b_BN: Tensor) -> Tensor:
    """The gram of the rows, t and e from the target's halves."""
    return gram_of(torch.cat([J_BMN, (a_BN + b_BN)[:, None] / 2, (a_BN - b_BN)[:, None] / 2], 1))


def halves(count: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    J = rows("generic", 3, count, elements=9)
    return J, *rows("generic", 2, 3, seed=5, elements=9)


def direction(
    set_: FeasibleSet, J_BMN: Tensor, half_BN: Tensor, wanted_BN: Tensor | None
) -> Tensor:
    """d [B, N] of one half, as long as wanted."""
    w = set_.weights(*split(gram_of(torch.cat([J_BMN, half_BN[:, None]], 1)))[:2])
    d = torch.einsum("bm,bmn->bn", w, J_BMN) + set_.target_weight * half_BN
    return d if wanted_BN is None else d * (wanted_BN.norm(dim=1) / d.norm(dim=1))[:, None]


@pytest.mark.parametrize("set_", [Cone(0.3), TopK(0.4), Halfspace()], ids=str)
@pytest.mark.parametrize("norm", ["none", "general", "target"])
def test_statistics_of_dense_vectors(set_: FeasibleSet, norm: str) -> None:
    J, a, b = halves()
    wanted = {"none": None, "general": J.mean(1), "target": (a + b) / 2}[norm]
    d_a, d_b = direction(set_, J, a, wanted), direction(set_, J, b, wanted)
    expected = [
        (a * b).sum(),
        ((a - b) / 2).square().sum(),
        ((d_a * b).sum() + (d_b * a).sum()) / 2,
        (d_a.square().sum() + d_b.square().sum()) / 2,
    ]
    got = statistics(set_, norm, gram_with_halves(J, a, b))
    assert torch.allclose(got, torch.stack(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", ["none", "general", "target"])
def test_statistics_where_a_half_vanishes(norm: str) -> None:
    J, a, b = halves(count=1)
    assert statistics(Cone(), norm, gram_with_halves(J, 0 * a, b)).isfinite().all()


def test_never_looks_at_a_value() -> None:
    """Tensors without values: whatever would make the host wait for a device fails on them."""
    gram = torch.empty(2, 6, 6, device="meta")
    new = statistics(Span(0.3), "target", gram)
    assert alpha_of(smoothed(smoothed(None, new), new), 5.0).shape == ()


def test_swapping_the_halves_changes_nothing() -> None:
    J, a, b = halves()
    each = [
        statistics(Hull(0.1), "general", gram_with_halves(J, *pair)) for pair in ((a, b), (b, a))
    ]
    assert torch.allclose(*each, rtol=1e-9)


@pytest.mark.parametrize("passes", [10.0, 25.0, 80.0])
def test_alpha_maximises_the_gain_of_the_run(passes: float) -> None:
    """Summed over steps, over shares of the update's length, for random moments with a > 0."""
    steps, inner = 200, 0
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    pass_T = passes * (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    for seed in range(50):
        r = 2 * torch.rand(4, generator=generator(seed), dtype=torch.float64)
        signal, noise, worth, square = r[0], r[1], r[2] / 2, r[3]
        t, d = (signal + noise).sqrt(), square.sqrt()
        alpha = alpha_of(r * torch.tensor([1.0, 1.0, 0.5, 1.0]), passes)
        share = torch.cat([(alpha * t / (alpha * t + (1 - alpha) * d))[None], grid])[:, None]
        along_t = (signal - share * pass_T / PASSES * noise) / t
        gain = ((1 - share) * worth / d + share * along_t).sum(1)
        assert gain[0] >= gain.max() - 1e-9
        inner += bool(0 < alpha < 1)
    assert inner > 15


def values(**named: float) -> Tensor:
    """The four statistics; |t|^2 = S + N = 2."""
    known = {"S": 1.0, "N": 1.0, "a": 0.5, "D": 2.0, **named}
    return torch.tensor([known[k] for k in "SNaD"], dtype=torch.float64)


def test_limits_of_alpha() -> None:
    assert alpha_of(values(N=0.0), 1e9) == 1  # t has no noise
    assert alpha_of(values(), 1e-9) == 1  # and is never used again
    assert alpha_of(values(S=-0.1), 1.0) == 0  # t is noise
    assert alpha_of(values(S=0.0, a=0.0), 1.0) == 0
    assert alpha_of(values(S=-0.1, a=-0.5), 1.0) == 0  # nothing is known
    assert alpha_of(values(S=-2.0, a=-9.0), 1.0) == 0  # more than all of t is noise
    assert alpha_of(values(a=1.0), 1e-9) == 0  # d is as good
    assert alpha_of(values(a=9.0), 1e-9) == 0
    assert alpha_of(torch.zeros(4), 1.0) == 0
    assert alpha_of(values(a=0.0, D=0.0), 9.0) == 1  # there is no d
    assert alpha_of(values(a=-9.0), 60.0) == alpha_of(values(a=0.0), 60.0) > 0
    assert alpha_of(values(), 2 * PASSES) == pytest.approx(0.25)  # r = (1 - 0.5)/2, |d| = |t|
    assert alpha_of(values(a=0.25, D=0.5), 2 * PASSES) == pytest.approx(1 / 7)  # |d| = |t|/2


def test_noise_passes_and_a_good_projection_mean_less_of_the_target() -> None:
    noise = [float(alpha_of(values(S=1.0, N=n, D=1 + n, a=0.2), 30.0)) for n in (0.01, 1.0, 9.0)]
    passes = [float(alpha_of(values(), e)) for e in (2.0, 9.0, 50.0)]
    worth = [float(alpha_of(values(a=a), 20.0)) for a in (0.0, 0.5, 0.9)]
    for alphas in (noise, passes, worth):
        assert alphas == sorted(alphas, reverse=True) and alphas[0] > alphas[1] > alphas[2] > 0


def test_smoothing() -> None:
    first, second = values(), values(S=3.0)
    state = smoothed(None, first)
    assert torch.allclose(alpha_of(state, 9.0), alpha_of(first, 9.0), rtol=1e-12)
    state = smoothed(state, second)
    assert torch.allclose(state, 0.09 * first + 0.1 * second)
    for bad in (torch.nan, torch.inf):
        assert torch.equal(smoothed(state, values(a=bad)), state)
    assert torch.equal(smoothed(None, values(a=torch.nan)), torch.zeros(4).double())


class World:
    """A run of 50 steps in which samples are learnt by heart as the rule's derivation says.

    Coordinates: the true direction, then one per target sample for its own error, then others. The
    true gradient is (1, what was learnt by heart, 0), that of sample i (1, its error at i, 0).
    A share of the rows are fresh draws of the true gradient; all have fresh noise.
    """

    steps, batch, count, others = 50, 8, 12, 400

    def __init__(self, *, error: float, size: int, useful: float, seed: int = 0) -> None:
        self.error, self.size, self.seed = error, size, seed
        self.kept = round(useful * self.count)
        # unit curvature; steps of this length take in an error wholly in P passes
        self.length = (1 + error**2 / self.batch) ** 0.5 / PASSES

    def true(self, place: Tensor) -> Tensor:
        gradient = place.clone()
        gradient[0], gradient[1 + self.size :] = 1.0, 0.0
        return gradient

    def step(self, place: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and the target's halves."""
        samples = torch.zeros(self.batch, len(place), dtype=torch.float64)
        chosen = torch.randperm(self.size, generator=g)[: self.batch]
        samples[torch.arange(self.batch), 1 + chosen] = self.error
        samples[:, 0] = 1.0
        J = 3 * torch.randn(self.count, len(place), generator=g).double() / self.others**0.5
        J[:, : 1 + self.size] = 0.0
        J[: self.kept] += self.true(place)
        return J, samples[: self.batch // 2].mean(0), samples[self.batch // 2 :].mean(0)

    def fall(self, set_: FeasibleSet, norm: str, alpha: float | None) -> tuple[float, float]:
        """By how much the true loss falls with a fixed alpha or the rule's, and the last alpha."""
        g, state = generator(self.seed), None
        place = torch.zeros(1 + self.size + self.others, dtype=torch.float64)
        used = alpha or 0.0
        for _ in range(self.steps):
            J, a, b = self.step(place, g)
            gram = gram_with_halves(J[None], a[None], b[None])
            if alpha is None:
                state = smoothed(state, statistics(set_, norm, gram))
                used = float(alpha_of(state, self.steps * self.batch / self.size))
            seen = gram[:, :-1, :-1]
            w = set_.weights(*split(seen)[:2])
            scale = norm_scale(norm, seen, torch.cat([w, torch.zeros_like(w[:, :1])], 1))
            u = (1 - used) * scale[0] * (w[0] @ J) + used * (a + b) / 2
            place = place - self.length * u / u.norm()
        return float(-place[0] - place[1 : 1 + self.size].square().sum() / 2), used


@pytest.mark.parametrize("norm", ["none", "general", "target"])
def test_scaling_all_gradients_leaves_alpha(norm: str) -> None:
    gram = gram_with_halves(*(x.double() for x in halves()))
    gram[:, -2, -2] += 9.0  # halves that agree
    alphas = [alpha_of(statistics(Cone(0.3), norm, scale**2 * gram), 20.0) for scale in SCALES]
    assert 0.05 < alphas[1] < 0.95
    assert torch.allclose(torch.stack(alphas), alphas[1], rtol=1e-6)


@pytest.mark.parametrize("error", [2.0, 5.0])
@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("useful", [0.0, 0.25])
def test_the_rule_nears_the_best_fixed_alpha(error: float, size: int, useful: float) -> None:
    """It is cautious where fresh useful rows undo what was learnt by heart."""
    world = World(error=error, size=size, useful=useful)
    fixed = [world.fall(TopK(0.25), "general", x)[0] for x in (0.0, 0.02, 0.1, 0.3, 0.5, 1.0)]
    fall, _ = world.fall(TopK(0.25), "general", None)
    assert fall > 0.7 * max(fixed) and fall > fixed[0] - 0.05
    assert size == 64 or fixed[-1] < -5.0  # what it must cope with: t alone does great harm


def test_alpha_in_clear_cases() -> None:
    set_, norm = TopK(0.25), "general"
    assert World(error=0.0, size=8, useful=0.0).fall(set_, norm, None)[1] == 1
    many = World(error=2.0, size=64, useful=0.0).fall(set_, norm, None)[1]
    alone = World(error=2.0, size=32, useful=0.0).fall(set_, norm, None)[1]
    helped = World(error=2.0, size=32, useful=0.5).fall(set_, norm, None)[1]
    few = World(error=2.0, size=8, useful=0.0).fall(set_, norm, None)[1]
    noisy = World(error=9.0, size=64, useful=0.0).fall(set_, norm, None)[1]
    assert many > 0.8 and few < 0.3 and noisy < 0.1 and helped < 0.8 * alone, (alone, helped)
