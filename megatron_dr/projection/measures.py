"""How long a direction is, and what a projection did: all from inner products.

A vector of a block is known by its coefficients [R] over the M rows and, last, the target:

    d = sum over i of direction_i x_i ,  x = (g_1, .., g_M, t) ,     a.b = a' gram b

So a direction may hold the target itself, as an update (1 - alpha) d + alpha t does.

Shape suffixes: M rows, B blocks, R = M + 1 (rows plus target).
"""

import torch
from torch import Tensor

_VANISHING = 1e-12  # |d|^2 relative to the rows' mean |g|^2 that is rounding, not a direction
_ZERO_ROW = 1e-6  # |w| relative to the block's largest that counts as none


def norm_scale(
    rule: str, gram_BRR: Tensor, direction_BR: Tensor, share_M: Tensor | None = None
) -> Tensor:
    """What d is multiplied by [B].

    none:    1.
    general: |mean g|/|d|.
    target:  |t|/|d|.
    tokens:  1/(M sum_i w_i T_i/T), for rows that are samples. Row i is g_i = M U_i/T, U_i its
             gradient summed over its T_i tokens and T = sum T_i, so that the rows' mean is the
             gradient of the mean token loss. Then scale d = sum_i w_i U_i / sum_i w_i T_i is
             the gradient of the rows' weighted mean token loss: of the chosen rows' own, where w
             chooses.

    1, too, where d vanishes (`general`, `target`: |d|^2 at most 1e-12 tr(G)/M, G the gram of the
    M rows) or sum_i w_i T_i is not positive (`tokens`: nothing chosen, or weights of both signs).

    :param gram_BRR: of the rows and, last, the target.
    :param direction_BR: d's coefficients. `tokens` takes the rows' for w.
    :param share_M: T_i/T, for `tokens` alone; [B, M] where blocks have rows of their own.
    :raises ValueError: an unknown rule, or `tokens` without share_M.
    """
    if rule not in ("none", "general", "target", "tokens"):
        known = "'none', 'general', 'target' or 'tokens'"
        raise ValueError(f"norm rule is {rule!r}; it must be {known}.")
    gram_BRR, direction_BR = gram_BRR.double(), direction_BR.double()
    if rule == "tokens":
        return _tokens_scale(direction_BR, share_M)
    length_sq_B = _dot(gram_BRR, direction_BR, direction_BR).clamp(min=0.0)
    if rule == "none":
        return torch.ones_like(length_sq_B)
    wanted_BR = _mean_row(direction_BR) if rule == "general" else _target(direction_BR)
    wanted_sq_B = _dot(gram_BRR, wanted_BR, wanted_BR).clamp(min=0.0)
    return torch.where(_vanishes(gram_BRR, length_sq_B), 1.0, (wanted_sq_B / length_sq_B).sqrt())


def report_sums(gram_BRR: Tensor, direction_BR: Tensor, update_BR: Tensor) -> Tensor:
    """[B, 9] in float64: what `report` is made of, and what adds up over blocks, windows and ranks.

    t.mean, |mean|^2, t.u, |u|^2, |t|^2, |d - t|^2, effective rows, zero rows, and 1. A square that
    vanishes (the rule of `norm_scale`) is 0. With an inner product that is not finite the first
    six are NaN: infinite gradients don't look like vanishing ones.

    :param gram_BRR: of the rows and, last, the target.
    :param direction_BR: the projection d's coefficients.
    :param update_BR: the coefficients of u, what the optimizer gets.
    """
    gram_BRR, direction_BR, update_BR = (x.double() for x in (gram_BRR, direction_BR, update_BR))
    target_BR, weights_BM = _target(direction_BR), direction_BR[:, :-1].abs()
    out = []
    for vector_BR in (_mean_row(direction_BR), update_BR):
        length_sq_B = _dot(gram_BRR, vector_BR, vector_BR)
        out.append(_dot(gram_BRR, vector_BR, target_BR))
        out.append(length_sq_B.masked_fill(_vanishes(gram_BRR, length_sq_B), 0.0))
    rest_BR = direction_BR - target_BR
    out += [gram_BRR[:, -1, -1], _dot(gram_BRR, rest_BR, rest_BR).clamp(min=0.0)]
    finite_B = gram_BRR.isfinite().all(2).all(1)
    out = [torch.where(finite_B, products_B, torch.nan) for products_B in out]
    largest_B1 = weights_BM.amax(1, keepdim=True)
    zero_BM = (weights_BM <= _ZERO_ROW * largest_B1).double() + 0.0 * largest_B1  # NaN stays NaN
    out += [_quotient(weights_BM.sum(1) ** 2, (weights_BM**2).sum(1)), zero_BM.sum(1)]
    return torch.stack([*out, torch.ones_like(out[0])], 1)


def report(sums_9: Tensor) -> dict[str, Tensor]:
    """What a projection did, of `report_sums` [..., 9]: of each block, or added up, of the model.

    cos_general: cosine of the rows' mean and t.       cos_update: cosine of the update and t.
    residual: |d - t| / |t|.                           effective_rows: (sum |w|)^2 / sum w^2.
    zero_rows: rows with |w| at most 1e-6 of the block's largest.

    w are the rows' coefficients in d; effective_rows is 1 / sum w^2 where w >= 0 sums to one. The
    last two are means over what was added up. A quotient whose denominator is 0 is 0, but NaN
    stays NaN, whatever it is divided by.
    """
    mean_t, mean_sq, update_t, update_sq, t_sq, rest_sq, effective, zero, count = sums_9.unbind(-1)
    return {
        "cos_general": _quotient(mean_t, mean_sq.sqrt() * t_sq.sqrt()),
        "cos_update": _quotient(update_t, update_sq.sqrt() * t_sq.sqrt()),
        "residual": _quotient(rest_sq.sqrt(), t_sq.sqrt()),
        "effective_rows": _quotient(effective, count),
        "zero_rows": _quotient(zero, count),
    }


def _tokens_scale(direction_BR: Tensor, share_M: Tensor | None) -> Tensor:
    if share_M is None:
        raise ValueError("norm rule 'tokens' needs share_M, each row's share of the tokens.")
    tokens_B = (direction_BR[:, :-1] * share_M.to(direction_BR)).sum(1)
    return torch.where(tokens_B > 0, 1.0 / (share_M.shape[-1] * tokens_B), 1.0)


def _dot(gram_BRR: Tensor, a_BR: Tensor, b_BR: Tensor) -> Tensor:
    """a.b [B] of two vectors known by their coefficients."""
    return torch.einsum("br,brs,bs->b", a_BR, gram_BRR, b_BR)


def _vanishes(gram_BRR: Tensor, length_sq_B: Tensor) -> Tensor:
    """Whether |d|^2 is rounding, not a direction. Beside infinite rows nothing is."""
    rounding_B = _VANISHING * gram_BRR.diagonal(dim1=1, dim2=2)[:, :-1].mean(1)
    return (length_sq_B <= rounding_B) & rounding_B.isfinite()


def _mean_row(like_BR: Tensor) -> Tensor:
    """Coefficients of the M rows' mean."""
    mean_BR = torch.full_like(like_BR, 1.0 / (like_BR.shape[1] - 1))
    mean_BR[:, -1] = 0.0
    return mean_BR


def _target(like_BR: Tensor) -> Tensor:
    """Coefficients of t."""
    target_BR = torch.zeros_like(like_BR)
    target_BR[:, -1] = 1.0
    return target_BR


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where((denominator != 0) | numerator.isnan(), numerator / denominator, 0.0)
