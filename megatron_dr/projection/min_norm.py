"""Several targets as one: the direction along which the one that gains least gains most.

With the targets' gradients t_1 .. t_K and a step along u, target k gains <t_k, u> to first order.
The direction of unit length whose least gain is the largest has the direction of

    t = sum_k w_k t_k ,   w = argmin over w >= 0, sum_k w_k = 1 of |sum_k w_k t_k|^2 ,

the point of the gradients' convex hull that is nearest to 0, as by the minimax theorem the maximum
over |u| <= 1 of min over w of <sum_k w_k t_k, u> is min over w of |sum_k w_k t_k|. Along it all
targets with a weight gain the same, |t|^2, the others more: <t_k, t> >= |t|^2 for every k. Where t
is 0, no direction is a gain for all. MGDA: Desideri, Comptes Rendus Mathematique 350 (2012) 313;
for the losses of several tasks, Sener and Koltun, arXiv 1810.04650. It is t for which this holds:
what general gradients can say of t is projected after.

Shape suffixes: K targets.
"""

import torch
from torch import Tensor

from megatron_dr.projection.solvers import solve_qp


def min_norm(gram_KK: Tensor) -> Tensor:
    """w [K] in float64, of the targets' inner products; NaN where these are not finite."""
    zero_1K = torch.zeros_like(gram_KK[:1], dtype=torch.float64)
    return solve_qp(gram_KK[None], zero_1K, upper=None, sum_to=1.0)[0]
