"""The mixing dial alpha of the update u = (1 - alpha) d + alpha t: a schedule, or by agreement.

d is the projection, scaled by the norm rule, and t the target gradient; mu is the true target
gradient, unknown. At first t is the better direction of the two: its cosine with mu is the larger
one wherever it was measured. But a small target set is used again and again, and is learnt by
heart, while the rows are new at every step. The rule `auto` spreads over the run as much of t as
pays (measured: docs/alpha.md).

**Worth.** The step's target batch is two halves, t = (t_A + t_B)/2, e = (t_A - t_B)/2. d_A is the
projection of t_A, scaled as d is (to |t| or |mean g|; a half's own is longer). Then, summed over
blocks and averaged over both halves and over steps,

    S = t_A.t_B = |t|^2 - |e|^2   expects |mu|^2: the halves' errors are independent
    N = |e|^2                     expects E|t - mu|^2
    a = d_A.t_B                   expects E d.mu: d_A has not seen t_B
    D = |d_A|^2

Optimizers like Adam set a step's length themselves, so what counts is by length: a step of length 1
along t gains S/|t|, with |t|^2 = S + N, and along d it gains a/|d|.

**Wear.** Sample i's gradient is mu + x_i, x_i its own error. A use of it also moves against x_i,
where curvature then makes mu point along -x_i, while the sample's own gradient keeps its x_i: a
cross-entropy is never fitted wholly. Errors of different samples are nearly at right angles, so
only a sample's own uses count. So after p passes over the target set

    t.mu = S - (p/P) N

Here mu outgrows an error in P passes. P depends on the model and the learning rate; P = 6 is
measured on one model. S counts as the worth without wear. Where every batch holds the whole set
this was seen (the halves agree as before while t.mu falls below 0); with more samples S falls, too,
and alpha with it, more than it should.

**The best share.** A run of T steps with batches of b out of n samples makes E = T min(1, b/n)
passes; with the share r of a step's length along t, p = r E at its end. As wear grows with use,
equal shares are best (Jensen), and the gain of the run,

    T ((1 - r) a/|d| + r (S - r E N/(2 P))/|t|) ,

is largest at

    r = (P/E) (S - a |t|/|d|) / N ,   within [0, 1]; 0 where S <= 0 (t is all noise) .

So noise, many passes, and a projection that is nearly as good each mean less of t. a < 0 counts as
0: that d opposes mu is mostly noise of a, and no reason to wear t out. Back from lengths,

    alpha = r |d| / (r |d| + (1 - r) |t|) .

Scaling S, N, a and D together leaves alpha, so averages that start at 0 need no correction.

Shape suffixes: M rows, B blocks, R = M + 2 (rows, t, e; or rows, t_A, t_B).
"""

import math

import torch
from torch import Tensor

from megatron_dr.projection.feasible_sets import FeasibleSet
from megatron_dr.projection.update import project

_PASSES = 6.0  # P: docs/alpha.md says how it was measured
_KEEP = 0.9  # of the average, at each step


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


def statistics(set_: FeasibleSet, norm: str, gram_BRR: Tensor) -> Tensor:
    """S, N, a and D [4] of a step, in float64, summed over blocks.

    :param norm: the norm rule that d is scaled by.
    :param gram_BRR: of the M rows, then t, then e.
    """
    gram_BRR = gram_BRR.double()
    halves_BRR = _halves(gram_BRR)
    rows = gram_BRR.shape[1] - 2
    worth, square = gram_BRR.new_zeros(()), gram_BRR.new_zeros(())
    for own, other in ((rows, rows + 1), (rows + 1, rows)):
        direction_BR = _direction(set_, norm, halves_BRR, own, gram_BRR)
        worth = worth + torch.einsum("br,br->", direction_BR, halves_BRR[:, :, other]) / 2
        square = square + torch.einsum("br,brs,bs->", direction_BR, halves_BRR, direction_BR) / 2
    return torch.stack([halves_BRR[:, -2, -1].sum(), gram_BRR[:, -1, -1].sum(), worth, square])


def smoothed(average_4: Tensor | None, new_4: Tensor, keep: float = _KEEP) -> Tensor:
    """keep average + (1 - keep) new, from 0 (None) on; a step that is not finite is left out.

    All steps must be in one unit: gradients of mean losses.
    """
    average_4 = torch.zeros_like(new_4) if average_4 is None else average_4
    mixed_4 = keep * average_4 + (1.0 - keep) * new_4
    return torch.where(new_4.isfinite().all(), mixed_4, average_4)


def in_unit_of(average_4: Tensor, new_4: Tensor, steps: int) -> Tensor:
    """An average of so many steps, times an unknown factor, as it would be in the unit of `new`.

    The factor is the one with which S + N, the square of |t|, is what it was at the new step.
    """
    average_4 = average_4.to(new_4)
    ratio = new_4[:2].sum() / average_4[:2].sum()
    scaled_4 = average_4 * ratio * (1.0 - _KEEP**steps)
    usable = scaled_4.isfinite().all() & (ratio > 0)
    return torch.where(usable, scaled_4, torch.zeros_like(new_4))


def alpha_of(average_4: Tensor, passes: float) -> Tensor:
    """alpha [], between 0 and 1, from the statistics up to a common factor.

    :param passes: E, how often the run goes over the target set.
    """
    signal, noise, worth, square = average_4.double().unbind()
    along_t, along_d = (signal + noise).clamp(min=0.0).sqrt(), square.clamp(min=0.0).sqrt()
    has_d = along_d > 0
    by_d = torch.where(has_d, worth.clamp(min=0.0) * along_t / along_d, 0.0)
    gain, wear = _PASSES * (signal - by_d), passes * noise
    share = torch.where(gain < wear, gain / wear, 1.0)
    share = torch.where((gain > 0) & (signal > 0), share, 0.0)
    mixed = share * along_d / (share * along_d + (1.0 - share) * along_t)
    # without a projection any share of t is the same direction, and without worth there is none
    return torch.where(share > 0, torch.where(has_d, mixed, 1.0), 0.0)


def _halves(gram_BRR: Tensor) -> Tensor:
    """The gram of (rows, t_A, t_B) from that of (rows, t, e)."""
    map_RR = torch.eye(gram_BRR.shape[1], dtype=gram_BRR.dtype, device=gram_BRR.device)
    map_RR[-2:, -2:] = 1.0  # t_A = t + e, and with the sign below t_B = t - e
    map_RR[-1, -1] = -1.0
    return map_RR @ gram_BRR @ map_RR.T


def _direction(
    set_: FeasibleSet, norm: str, halves_BRR: Tensor, own: int, gram_BRR: Tensor
) -> Tensor:
    """Coefficients [B, R] of half `own`'s projection, as long as the norm rule makes d itself."""
    rows = halves_BRR.shape[1] - 2
    place = torch.tensor([*range(rows), own], device=halves_BRR.device)
    seen_BRR = halves_BRR[:, place][:, :, place]
    half = project(seen_BRR, set_, norm)
    scale_B = half.scale_B
    if norm == "target":  # a half is noisier than the whole, hence longer
        half_sq_B = seen_BRR[:, -1, -1]
        ratio_B = (gram_BRR[:, -2, -2].clamp(min=0.0) / half_sq_B).sqrt()
        scale_B = torch.where(half_sq_B > 0, scale_B * ratio_B, scale_B)
    whole_BR = torch.zeros_like(halves_BRR[:, 0])
    return whole_BR.index_copy_(1, place, scale_B[:, None] * half.direction_BR)
