"""How far a sketched gram is from the exact one: before a run (`size_for`) and after a step.

With bucket b(n) and sign s(n) of `CountSketch`, and x_i [N] the R vectors of a block, the gram A
and its estimate G differ by products of elements that collide:

    G_ij - A_ij  =  sum over n != m with b(n) = b(m) of  s(n) s(m) x_in x_jm

Its mean is zero. Two of its terms are correlated only if they are of one pair {n, m}, and a pair
collides with probability 1/K, so that

    E (G_ij - A_ij)^2  =  (|x_i|^2 |x_j|^2 + (x_i . x_j)^2 - 2 sum_n x_in^2 x_jn^2) / K
    E |G - A|_F^2      =  (tr(A)^2 + |A|_F^2 - 2 sum_n |x_n|^4) / K ,    |x_n|^2 = sum_i x_in^2

(Charikar, Chen, Farach-Colton, ICALP 2002, bound the first.) The last term is small unless a few
elements hold most of a gradient. As tr(A)^2 <= R |A|_F^2 (Cauchy-Schwarz on the eigenvalues), the
relative error is at most sqrt((R + 1)/K), which vectors of one length at right angles reach.

Shape suffixes: M rows, N elements, K sketch size, B blocks, R = M + 1 (rows plus target).
"""

import math

from torch import Tensor

from megatron_dr.projection.gram import gram_of

_LARGEST = 2**31  # of a `CountSketch`


def size_for(error: float, num_vectors: int) -> int:
    """The smallest power of two K with sqrt((R + 1)/K) <= error, R = num_vectors.

    Then sqrt(E |G - A|_F^2) <= error |A|_F for any R vectors of any lengths and angles.

    :param error: relative to |A|_F, between 0 and 1.
    :raises ValueError: another error, no vector, or a K above 2^31.
    """
    if not 0.0 < error < 1.0:
        raise ValueError(f"error is {error}; it must lie between 0 and 1.")
    if num_vectors < 1:
        raise ValueError(f"num_vectors is {num_vectors}; it must be at least 1.")
    needed = (num_vectors + 1) / error / error
    if needed > _LARGEST:
        least = math.sqrt((num_vectors + 1) / _LARGEST)
        raise ValueError(
            f"error is {error}; with {num_vectors} vectors it must be at least {least:.2g}, "
            "for a sketch of 2^31 elements."
        )
    return 1 << (math.ceil(needed) - 1).bit_length()


def gram_and_error(rows_BRK: Tensor) -> tuple[Tensor, Tensor]:
    """G [B, R, R] of sketched rows, and (tr(G)^2 + |G|_F^2)/K [B], both in float64.

    The second estimates E |G - A|_F^2 and on average is not below it: tr(G) and G are unbiased, so
    the means of their squares exceed tr(A)^2 and |A|_F^2 (by a share of order 1/K), and what is
    left out, -2 sum_n |x_n|^4 / K, is negative. Errors of separately sketched blocks add up.

    The difference of the grams of two halves of the buckets would serve too, but it holds
    sum_n |x_n|^4 whole and not divided by K: with large K it is many times the error.
    """
    gram_BRR = gram_of(rows_BRK)
    trace_B = gram_BRR.diagonal(dim1=1, dim2=2).sum(1)
    return gram_BRR, (trace_B**2 + gram_BRR.square().sum((1, 2))) / rows_BRK.shape[2]
