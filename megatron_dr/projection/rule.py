"""alpha and beta chosen at every step, from two halves of the target batch: the style `auto`.

mu is the gradient of the target's loss on new data: what a step should go along. Known are, of
every step, vectors that depend on it: t (the target batch's mean gradient, of the halves t_A and
t_B), d (the projection, as long as the norm rule makes it; d_A of the half t_A alone) and g (the
general data's mean gradient, made as long). n samples are in the target set, b in a batch, lr_k is
the learning rate of step k.

**All is by unit length.** Optimizers like Adam and Muon set a step's length themselves, so a step
along v gains v.mu/|v|. Below t, d, g stand for t/|t|, d/|d|, g/|g|, gains are in units of |t|, and
averages are of every step's unit vectors: one spike of |t| has one step's part in them. So neither
layout nor token count nor loss scale changes what is gathered.

    D = mean over both halves of d_A.t_B / |t|   what d gains: d_A has not seen t_B, so the errors
                                                 of t_B are independent of it
    G = g.t                                      what g gains
    M = the 3 x 3 cosines of (g, d, t)
    m = t_A.t_B / |t|^2                          what t gains while it is new: expects |mu|^2/|t|^2

M, G and D are averaged with 0.95 over steps (from weight 0 on, so without a bias towards 0); an
average D below 0 counts as 0. m is averaged over the first pass alone, beside a prior of 0.4 with
the weight of 16 steps: later on both halves hold samples that were trained on, and with n < 2b the
same ones, so they agree though t is worn. But where they agree less than that, t gains no more than
they say: the smaller of the two counts, m's average over the first pass and one with 0.95 over all
steps, which begins at 0.4.

**Wear.** Sample i's gradient is mu + x_i, x_i its own error. A use of it also moves against x_i,
where curvature then makes mu point along -x_i, while its own gradient keeps its x_i. Errors of
different samples are nearly at right angles, so only a sample's own uses count: after p passes over
the target set, by t's share of the steps' length and by learning rate, t gains m (1 - p/P). On
fresh data cos(mu, t) fell about linearly to 0, after 8.0, 9.8, 12.7 and 7.7 passes (four regimes,
docs/alpha.md). P is less, 5: the errors that are learnt by heart cost more than that t gains less,
and of ten kinds of data P = 7.5 was within 2% of the best constant in six, P = 5 in nine.

**The choice.** With r the share of t among unit vectors,

    v = r t + (1 - r) (beta g + (1 - beta) d) ,    |v| from M
    E = (b/n) sum over steps of lr_k / max lr                    passes of the whole run
    J(r, beta) = [ r m (1 - (r/|v|) E/(2P)) + (1 - r) (beta G + (1 - beta) D) ] / |v|

J is the mean gain of the run's steps if all are as this one: r/|v| is t's part of a step's length,
so (r/|v|) E passes are gone at the end and half of them on average. (Equal shares over the run are
best, as wear grows with use: Jensen.) |v| is far below the sum of lengths where directions are
nearly orthogonal, so mixing pays, and the middle between a cone (beta 0) and a mix (beta 1) is
open. (r*, beta*) maximises J on r = 0, .05 .. 1 and beta = 0, .25 .. 1.

**Forgetting.** J is flat at its top, and general loss is not: among r >= r*/2 with J >= .9 J* the
largest v.g/|v| is taken, and at that r beta is raised while J >= .75 J*. With a floor k only those
(r, beta) count whose v has, at this step, a cosine of at least k with the rows' mean itself (not
scaled by the norm rule); where none has, those with the largest. v = g has the cosine 1 where the
norm rule leaves g's direction (all of one block; `general`, `none` and `tokens` of several), so
there the floor holds at every step.

**Back from unit lengths**, with u of `update` and true lengths |t|, |d|, |g|,

    u = v / (r/|t| + (1 - r) (beta/|g| + (1 - beta)/|d|)) = alpha t + (1 - alpha) (b g + (1 - b) d)
    alpha = (r/|t|) / (the denominator) ,    b = (beta/|g|) / (beta/|g| + (1 - beta)/|d|)

so that b = beta where d and g are as long, as the norm rules `general` and `target` make them.

The constants (.4 at 16, .9, .75, .95) were chosen on five small regimes with one model and Adam, P
on these and five more; docs/alpha.md has what was measured. The rule and its derivation are ours.

Shape suffixes: M rows, B blocks, R = M + 2 (rows, t, e = (t_A - t_B)/2), V vectors, C candidates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dr.projection.feasible_sets import FeasibleSet
from megatron_dr.projection.update import project, scaled_mean

PASSES = 5.0  # P
_KEEP = 0.95  # of the averages, at each step
_PRIOR, _PRIOR_WEIGHT = 0.4, 16.0  # of m
_NEAR, _NEAR_BETA = 0.1, 0.25  # of J* that may be given up for the general data
_VANISHING = 1e-12  # |.|^2 relative to the rows' mean |g_i|^2 that is rounding, not a direction
_SHORT = 1e-6  # |v| that counts as this much
STATE = 9  # numbers of the state


@dataclass(frozen=True)
class Seen:
    """What a step's gram shows, in float64, summed over blocks.

    Attributes:
        cosine_44: of g, d, t and the rows' mean before the norm rule; a vector that vanishes has 0.
        length_3: |g|, |d|, |t|; 0 where it vanishes.
        worth: D.
        agreement: m.
        weights_BM: of the projection of t.
    """

    cosine_44: Tensor
    length_3: Tensor
    worth: Tensor
    agreement: Tensor
    weights_BM: Tensor

    @property
    def finite(self) -> Tensor:
        """Whether the step can be averaged."""
        return (self.cosine_44.sum() + self.worth + self.agreement).isfinite()


@dataclass(frozen=True)
class Choice:
    """(r, beta) of a step, and the averages that J was made of."""

    r: Tensor
    beta: Tensor
    D: Tensor
    G: Tensor
    m: Tensor


def seen(set_: FeasibleSet, norm: str, gram_BRR: Tensor, share_M: Tensor | None = None) -> Seen:
    """Of a step: three projections, of t and of its halves, solved at once.

    :param norm: the norm rule that d is scaled by.
    :param gram_BRR: of the M rows, then t, then e, times any factor.
    :param share_M: of the rows' tokens, for the norm rule `tokens`.
    """
    gram_BRR = gram_BRR.double()
    blocks, rows = len(gram_BRR), gram_BRR.shape[1] - 2
    maps_3SR = _maps(rows, gram_BRR)
    grams_3BSS = torch.einsum("xsr,brq,xpq->xbsp", maps_3SR, gram_BRR, maps_3SR)
    found = project(grams_3BSS.flatten(0, 1), set_, norm, share_M=share_M)
    d_3BS = (found.scale_B[:, None] * found.direction_BR).unflatten(0, (3, blocks))
    if norm == "target":  # a half is noisier than the whole, hence longer
        d_3BS = d_3BS * _whole_length(grams_3BSS)[..., None]
    g_BS = scaled_mean(grams_3BSS[0], norm, share_M)
    mean_BS = scaled_mean(grams_3BSS[0], "none")
    t_3BR = maps_3SR[:, None, -1].expand(-1, blocks, -1)
    d_3BR = torch.einsum("xbs,xsr->xbr", d_3BS, maps_3SR)
    g_BR, mean_BR = g_BS @ maps_3SR[0], mean_BS @ maps_3SR[0]
    vectors_VBR = torch.stack([g_BR, d_3BR[0], t_3BR[0], mean_BR, *d_3BR[1:], *t_3BR[1:]])
    product_VV = torch.einsum("vbr,brq,wbq->vw", vectors_VBR, gram_BRR, vectors_VBR)
    square_V = product_VV.diagonal()
    rounding = _VANISHING * gram_BRR.diagonal(dim1=1, dim2=2)[:, :rows].mean(1).sum()
    least_V = rounding.repeat(8)
    least_V[2] = least_V[6:] = 0.0  # t is a gradient, not a sum; its halves, too
    one_V = torch.where(square_V > least_V, square_V.rsqrt(), 0.0 * square_V)  # NaN stays NaN
    cosine_VV = one_V[:, None] * product_VV * one_V
    gain = product_VV[4, 7] * one_V[4] + product_VV[5, 6] * one_V[5]
    return Seen(
        cosine_VV[:4, :4], product_VV.diagonal()[:3] * one_V[:3], gain * one_V[2] / 2.0,
        product_VV[6, 7] * one_V[2].square(), found.weights_BM[:blocks],
    )  # fmt: skip


def gathered(state_9: Tensor | None, new: Seen) -> Tensor:
    """The averages with another step's; a step that is not finite is left out.

    The state: the averages' weight; D, g.d, g.t and d.t, each times it; the agreement's own
    average, which begins at m's prior; the sum and the number of m's steps; passes so far. All are
    pure numbers.
    """
    state_9 = blank(new.worth) if state_9 is None else state_9
    cos_44, one = new.cosine_44, torch.ones_like(new.worth)
    step_6 = torch.stack([one, new.worth, cos_44[0, 1], cos_44[0, 2], cos_44[1, 2], new.agreement])
    is_new = (state_9[8] < 1.0).double()
    after_9 = torch.cat([
        _KEEP * state_9[:6] + (1.0 - _KEEP) * step_6,
        state_9[6:8] + is_new * torch.stack([new.agreement, one]), state_9[8:],
    ])  # fmt: skip
    return torch.where(new.finite, after_9, state_9)


def blank(like: Tensor, passes: float = 0.0) -> Tensor:
    """A state in which nothing is gathered yet.

    :param passes: over the target set that were made before.
    """
    state_9 = like.new_zeros(STATE, dtype=torch.float64)
    state_9[5], state_9[8] = _PRIOR, passes
    return state_9


def chosen(state_9: Tensor, new: Seen, passes: float, floor: float = 0.0) -> Choice:
    """(r, beta) of the step whose gram `new` is, gathered in the state already.

    :param passes: E.
    :param floor: k; 0: none.
    """
    weight, worth, gd, gt, dt, agreement, total, number, _ = state_9.unbind()
    D, gd, gt, dt = (x / weight.clamp(min=1e-300) for x in (worth, gd, gt, dt))
    D, m = D.clamp(min=0.0), torch.minimum(_unworn(total, number), agreement).clamp(min=0.0)
    r_C, beta_C = _grid(state_9)
    v_C3 = _mixed(r_C, beta_C)
    unit = torch.ones_like(gd)
    cosine_33 = torch.stack([unit, gd, gt, gd, unit, dt, gt, dt, unit]).view(3, 3)
    length_C = _length(v_C3, cosine_33)
    worn_C = 1.0 - r_C / length_C * passes / (2.0 * PASSES)
    gain_C = (v_C3 @ torch.stack([gt, D, torch.zeros_like(D)]) + r_C * m * worn_C) / length_C
    allowed_C = torch.ones_like(r_C, dtype=torch.bool)
    if floor > 0.0:
        now_C = v_C3 @ new.cosine_44[:3, 3] / _length(v_C3, new.cosine_44[:3, :3])
        allowed_C = now_C >= now_C.max().clamp(max=floor) - 1e-12
    gain_C = torch.where(allowed_C, gain_C, -torch.inf)
    best, r_best = gain_C.max(), r_C.take(gain_C.argmax())
    near_C = (gain_C >= best - _NEAR * best.abs()) & (r_C >= r_best / 2.0)
    general_C = v_C3 @ cosine_33[0] / length_C
    r = r_C.take(torch.where(near_C, general_C, -torch.inf).argmax())
    near_C = (gain_C >= best - _NEAR_BETA * best.abs()) & (r_C == r)
    beta = beta_C.take(torch.where(near_C, beta_C, -1.0).argmax())
    return Choice(r, beta, D, gt, m)


def shares(choice: Choice, new: Seen) -> tuple[Tensor, Tensor]:
    """alpha and b of `update.project`; lengths that vanish have no part, |d| counts as |g| then."""
    g_length, d_length, t_length = new.length_3.unbind()
    by_g, by_t = _inverse(g_length), choice.r * _inverse(t_length)
    by_d = torch.where(d_length == 0, by_g, _inverse(d_length)) * (1.0 - choice.beta)
    by_g = by_g * choice.beta
    rest = (1.0 - choice.r) * (by_g + by_d)
    return _quotient(by_t, by_t + rest), _quotient(by_g, by_g + by_d)


def worn(state_9: Tensor, choice: Choice, new: Seen, share: float) -> Tensor:
    """The state after the step: t's part of its length has worn the samples.

    :param share: b/n lr/(max lr): passes of a step that is t alone.
    """
    v_13 = _mixed(choice.r[None], choice.beta[None])
    used = choice.r / _length(v_13, new.cosine_44[:3, :3])[0] * share
    passes = state_9[8] + torch.where(new.finite, used, 0.0)
    return torch.cat([state_9[:8], passes[None]])


def _maps(rows: int, like: Tensor) -> Tensor:
    """[3, M + 1, R]: rows and t; rows and t_A = t + e; rows and t_B = t - e."""
    maps_3SR = torch.eye(rows + 1, rows + 2, dtype=like.dtype, device=like.device).repeat(3, 1, 1)
    maps_3SR[1, -1, -1], maps_3SR[2, -1, -1] = 1.0, -1.0
    return maps_3SR


def _whole_length(grams_3BSS: Tensor) -> Tensor:
    """|t| / |own t| [3, B], 1 where that vanishes."""
    square_3B = grams_3BSS[:, :, -1, -1].clamp(min=0.0)
    return torch.where(square_3B > 0, (square_3B[0] / square_3B).sqrt(), 1.0)


def _unworn(total: Tensor, number: Tensor) -> Tensor:
    """m with its prior."""
    return (_PRIOR * _PRIOR_WEIGHT + total) / (_PRIOR_WEIGHT + number)


def _grid(like: Tensor) -> tuple[Tensor, Tensor]:
    """r and beta of the candidates."""
    r = torch.arange(21, dtype=torch.float64, device=like.device) / 20.0
    beta = torch.arange(5, dtype=torch.float64, device=like.device) / 4.0
    r_C, beta_C = torch.cartesian_prod(r, beta).unbind(1)
    return r_C, beta_C


def _mixed(r_C: Tensor, beta_C: Tensor) -> Tensor:
    """v over g, d and t [C, 3]."""
    return torch.stack([(1.0 - r_C) * beta_C, (1.0 - r_C) * (1.0 - beta_C), r_C], 1)


def _length(v_C3: Tensor, cosine_33: Tensor) -> Tensor:
    return torch.einsum("ci,ij,cj->c", v_C3, cosine_33, v_C3).clamp(min=_SHORT**2).sqrt()


def _inverse(length: Tensor) -> Tensor:
    return torch.where(length == 0, 0.0, 1.0 / length)


def _quotient(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole == 0, 0.0, part / whole)
