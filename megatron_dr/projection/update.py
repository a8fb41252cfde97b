"""The equation: from inner products to what the optimizer gets. Everything else serves it.

With the rows J [M, N], the target t [N] and their gram, per block,

    w = argmin over w in W of  1/2 |J^T w - t|^2 + ridge     the feasible set's (feasible_sets)
    d = J^T w + tau t                                        tau: 0; 1 for sets that hold t itself
    u = (1 - a) (b s' g + (1 - b) s d) + a t                 s, s': the norm rule's; a: alpha

g is the rows' mean, the general gradient of plain training, and s' the factor that the norm rule
gives it in d's place (1, but for the rule `target`); b, beta, is its share beside d. b = 0 leaves g
out, b = 1 is a plain mix of general data and target. (Hu, Liu, Mao, Ma, Dr. Post-Training, arXiv
2605.07063; s, a and b are ours). d and u are known by their coefficients [R] over the rows and,
last, t.

Shape suffixes: M rows, B blocks, R = M + 1 (rows plus target).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dr.projection.feasible_sets import FeasibleSet
from megatron_dr.projection.gram import split
from megatron_dr.projection.measures import norm_scale


@dataclass(frozen=True)
class Update:
    """What a projection found, in float64 on the gram's device.

    Attributes:
        gram_BRR: of the rows and, last, the target.
        weights_BM: w.
        direction_BR: d.
        scale_B: s.
        update_BR: u.
        alpha: a.
        beta: b.
    """

    gram_BRR: Tensor
    weights_BM: Tensor
    direction_BR: Tensor
    scale_B: Tensor
    update_BR: Tensor
    alpha: Tensor | float
    beta: Tensor | float = 0.0


def project(
    gram_BRR: Tensor, set_: FeasibleSet, norm: str, alpha: Tensor | float = 0.0,
    share_M: Tensor | None = None, weights_BM: Tensor | None = None, beta: Tensor | float = 0.0,
) -> Update:  # fmt: skip
    """u of every block: the equation above, line by line.

    Args:
        norm: the rule for s (`measures.norm_scale`).
        share_M: of the rows' tokens, for the rule `tokens`; [B, M] where blocks have their own.
        weights_BM: w where it is known without the set.
        beta: the number 0 computes nothing of g.
    """
    gram_BRR = gram_BRR.double()
    gram_BMM, cross_BM, _ = split(gram_BRR)
    w_BM = set_.weights(gram_BMM, cross_BM) if weights_BM is None else weights_BM
    tau_B1 = torch.full_like(w_BM[:, :1], set_.target_weight)
    d_BR = torch.cat([w_BM, tau_B1], 1)
    s_B = norm_scale(norm, gram_BRR, d_BR, share_M)
    scaled_BR = s_B[:, None] * d_BR
    if isinstance(beta, Tensor) or beta != 0.0:
        scaled_BR = beta * scaled_mean(gram_BRR, norm, share_M) + (1.0 - beta) * scaled_BR
    u_BR = (1.0 - alpha) * scaled_BR
    u_BR[:, -1] += alpha
    return Update(gram_BRR, w_BM, d_BR, s_B, u_BR, alpha, beta)


def scaled_mean(gram_BRR: Tensor, norm: str, share_M: Tensor | None = None) -> Tensor:
    """s' g [B, R]: the rows' mean, as long as the norm rule makes it in d's place."""
    g_BR = torch.full_like(gram_BRR[:, 0], 1.0 / (gram_BRR.shape[1] - 1))
    g_BR[:, -1] = 0.0
    return norm_scale(norm, gram_BRR, g_BR, share_M)[:, None] * g_BR
