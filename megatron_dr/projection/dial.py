"""The mixing dial alpha of the update u = (1 - alpha) d + alpha t: a schedule, or by agreement.

d is the projection, scaled by the norm rule, and t the target gradient. t is right on average and
noisy; d has less of t's noise and lacks what the general rows cannot say. The rule `auto` asks the
step's own data how much of each is true. mu is the true target gradient, unknown.

**Halves.** The target batch is two independent halves, t = (t_A + t_B)/2, e = (t_A - t_B)/2, and so
are the rows, even and odd. d_A1 is the projection of t_A on the even rows, and so on: four of
them, each as long as the norm rule makes d itself (|t|, or |mean g| of all rows; a half's own is
longer). Their inner products, summed over blocks and averaged over the four and over steps, are

    S = t_A.t_B = |t|^2 - |e|^2   expectation |mu|^2: the halves' errors are independent
    N = |e|^2                     expectation E|t - mu|^2
    a = d_A.t_B                   expectation E d.mu: d_A has not seen t_B
    o = d_A.t_A                   so (o - a)/2 expects E d.(t - mu), t's noise that d took over
    X = d_A1.d_B2                 the square of what d is whatever t's noise and the rows
    Y = d_A1.d_A2                 ... whatever the rows, with a half's noise
    D = |d_A1|^2

**What stays.** Updates add up over many steps, over which every error that is drawn afresh averages
out: over H = 40 steps its square shrinks to 1/H. But a finite target set repeats its error. A batch
of b out of n samples has error variance sigma^2/b, the set's mean sigma^2/n: the share b/n = phi of
N stays. So the second moments that stay are

    Q = [[D', a + f (o - a)/2], [a + f (o - a)/2, S + f N]] ,     f = phi + (1 - phi)/H ,
    D' = X + f (Y - X)/2 + (D - Y)/H

(the halves by which t's noise is less than t_A's).

**The best mix.** u = beta d + gamma t has the largest cosine with mu where (beta, gamma) is a
multiple of Q^-1 (a, S), as the signals are d.mu = a and t.mu = S. Times det Q > 0 that is

    beta = f (N a - S (o - a)/2) ,     gamma = S D' - a^2 - f a (o - a)/2 ,
    alpha = gamma / (beta + gamma) .

Clamped at 0: a first, so that a direction that opposes mu gets no share; then beta (d says no more
than t does) and gamma (d is mu itself, or, S <= 0, t is all noise). If both vanish alpha is 1 where
S > 0 and else 0. Scaling all seven leaves alpha, so averages that start at 0 need no correction.

Two halves of the rows say something only if the rows are exchangeable, drawn alike. Where each row
is a domain of its own, all rows count as both halves: then D = Y, and all that the rows cannot say
or add counts as staying. What the rule cannot see: once the model knows its target samples by
heart, the halves agree on what they say, not on mu.

Shape suffixes: M rows, B blocks, R = M + 2 (rows, t, e; or rows, t_A, t_B).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_dr.projection.feasible_sets import FeasibleSet
from megatron_dr.projection.gram import split
from megatron_dr.projection.measures import norm_scale

_HORIZON = 40  # H; between 20 and 100 the rule's regret is flat in simulations of 12 to 120 steps


def alpha_at(style: str, start: float, end: float, step: int, steps: int) -> float:
    """alpha at a step of a run: `start` at step 0, `end` from step `steps` on.

    :param style: `constant` (start always), `linear`, or `cosine` (half a cosine, flat at both
        ends).
    """
    if style not in ("constant", "linear", "cosine"):
        raise ValueError(f"alpha style is {style!r}; it must be 'constant', 'linear' or 'cosine'.")
    if steps < 1:
        raise ValueError(f"steps is {steps}; an alpha schedule needs at least 1.")
    share = min(max(step / steps, 0.0), 1.0)
    if style == "cosine":
        share = (1.0 - math.cos(math.pi * share)) / 2.0
    return start if style == "constant" else (1.0 - share) * start + share * end


def statistics(set_: FeasibleSet, norm: str, gram_BRR: Tensor, *, exchangeable: bool) -> Tensor:
    """S, N, a, o, X, Y and D [7] of a step, in float64, summed over blocks.

    :param norm: the norm rule that d is scaled by.
    :param gram_BRR: of the M rows, then t, then e.
    :param exchangeable: whether the rows are drawn alike. Of an odd number the last is left out;
        a single row is both halves.
    """
    gram_BRR = gram_BRR.double()
    signal, noise = gram_BRR[:, -2, -2] - gram_BRR[:, -1, -1], gram_BRR[:, -1, -1]
    places = _places(gram_BRR.shape[1] - 2, exchangeable, gram_BRR.device)
    halves_BRR = _halves(gram_BRR)
    seen_BRR = torch.cat([halves_BRR[:, place][:, :, place] for place in places])
    direction_BR = _directions(set_, norm, seen_BRR, gram_BRR)
    whole_4BR = gram_BRR.new_zeros(4, *gram_BRR.shape[:2])
    for whole_BR, place, part_BR in zip(whole_4BR, places, direction_BR.chunk(4), strict=True):
        whole_BR.index_copy_(1, place, part_BR)
    product_44 = torch.einsum("kbr,brs,lbs->kl", whole_4BR, halves_BRR, whole_4BR)
    target_42 = torch.einsum("kbr,brh->kh", whole_4BR, halves_BRR[:, :, -2:])
    worth = (target_42[:2, 1] + target_42[2:, 0]).mean() / 2
    own = (target_42[:2, 0] + target_42[2:, 1]).mean() / 2
    apart = (product_44[0, 3] + product_44[1, 2]) / 2
    rows_apart = (product_44[0, 1] + product_44[2, 3]) / 2
    together = product_44.diagonal().mean()
    return torch.stack([signal.sum(), noise.sum(), worth, own, apart, rows_apart, together])


def smoothed(average_7: Tensor | None, new_7: Tensor, keep: float = 0.9) -> Tensor:
    """keep average + (1 - keep) new, from 0 (None) on; a step that is not finite is left out."""
    average_7 = torch.zeros_like(new_7) if average_7 is None else average_7
    mixed_7 = keep * average_7 + (1.0 - keep) * new_7
    return torch.where(new_7.isfinite().all(), mixed_7, average_7)


def alpha_of(average_7: Tensor, phi: float) -> Tensor:
    """alpha [], between 0 and 1, from the statistics up to a common factor.

    :param phi: min(1, batch / size of the target set), the share of t's noise that stays.
    """
    signal, noise, worth, own, apart, rows_apart, together = average_7.double().unbind()
    stays = phi + (1.0 - phi) / _HORIZON
    taken_over = (own - worth) / 2
    worth = worth.clamp(min=0.0)
    moment = apart + stays * (rows_apart - apart) / 2 + (together - rows_apart) / _HORIZON
    beta = (stays * (noise * worth - signal * taken_over)).clamp(min=0.0)
    gamma = (signal * moment - worth**2 - stays * worth * taken_over).clamp(min=0.0)
    total = beta + gamma
    return torch.where(total > 0, gamma / total, (signal > 0).double())


def _places(rows: int, exchangeable: bool, device: torch.device) -> list[Tensor]:
    """Where d_A1, d_A2, d_B1 and d_B2 find their rows and, last, their half of the target."""
    pairs, numbers = rows // 2, torch.arange(rows + 2, device=device)
    whole = [numbers[:rows], numbers[:rows]]
    parts = [numbers[: 2 * pairs : 2], numbers[1 : 2 * pairs : 2]]
    chosen = parts if exchangeable and pairs else whole
    return [
        torch.cat([part, numbers[half : half + 1]]) for half in (rows, rows + 1) for part in chosen
    ]


def _halves(gram_BRR: Tensor) -> Tensor:
    """The gram of (rows, t_A, t_B) from that of (rows, t, e)."""
    map_RR = torch.eye(gram_BRR.shape[1], dtype=gram_BRR.dtype, device=gram_BRR.device)
    map_RR[-2:, -2:] = 1.0  # t_A = t + e, and with the sign below t_B = t - e
    map_RR[-1, -1] = -1.0
    return map_RR @ gram_BRR @ map_RR.T


def _directions(set_: FeasibleSet, norm: str, seen_BRR: Tensor, gram_BRR: Tensor) -> Tensor:
    """Coefficients of the scaled projections, for the four stacked problems [4 B, R]."""
    gram_BMM, cross_BM, half_sq_B = split(seen_BRR)
    weights_BM = set_.weights(gram_BMM, cross_BM)
    target_B1 = torch.full_like(weights_BM[:, :1], set_.target_weight)
    direction_BR = torch.cat([weights_BM, target_B1], 1)
    scale_B = norm_scale(norm, seen_BRR, direction_BR)
    if norm != "none":  # a half is noisier than the whole, hence longer
        if norm == "general":
            whole_sq_B, part_sq_B = gram_BRR[:, :-2, :-2].mean((1, 2)), gram_BMM.mean((1, 2))
        else:
            whole_sq_B, part_sq_B = gram_BRR[:, -2, -2], half_sq_B
        ratio_B = (whole_sq_B.clamp(min=0.0).repeat(4) / part_sq_B).sqrt()
        scale_B = torch.where(part_sq_B > 0, scale_B * ratio_B, scale_B)
    return scale_B[:, None] * direction_BR
