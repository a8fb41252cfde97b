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

A Kronecker sketch (`kronecker.py`) is measured by its halves instead. Each side's rows are
independent, so that half of them is a sketch of its own, and so is each of four quarters. With the
products g_ab of quarter a of P_out and b of P_in, g = g_11 + g_12 + g_21 + g_22, and

    E (g - A)^2  =  E (g_11 + g_12 - g_21 - g_22)^2 + E (g_11 + g_21 - g_12 - g_22)^2
                    - E (g_11 - g_12 - g_21 + g_22)^2

as what one side does, the other, and both together add up (Hoeffding's decomposition). A side that
is left as it is has no noise, and no halves. Of a `CountSketch` halves would say too much, since
there an element is in one of them alone.

Shape suffixes: M rows, N elements, K sketch size, B blocks, R = M + 1 (rows plus target).
"""

import math
from collections.abc import Sequence

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


def product_errors(
    rows_MKK: Tensor, target_KK: Tensor, shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Of M Kronecker sketches and a target's: estimates of sum E (<C_i, T> - <G_i, t>)^2 and of
    sum |G_i|^2 |t|^2, scalars in fp32. Without noise the first is 0.

    It is unbiased, and so may be below 0 where there are few products; with a side of one number
    it is NaN.

    :param shape: (O, I) of the whole weight.
    """
    (out, inner), products_MKK = shape, rows_MKK * target_KK
    length = rows_MKK.square().sum() * target_KK.square().sum()
    sign_K, sign_L = (
        _signs(size, whole, products_MKK)
        for size, whole in zip(products_MKK.shape[1:], (out, inner), strict=True)
    )
    error = length.new_zeros(())
    if sign_K is not None:
        error = error + (products_MKK.sum(2) @ sign_K).square().sum()
    if sign_L is not None:
        error = error + (products_MKK.sum(1) @ sign_L).square().sum()
    if sign_K is not None and sign_L is not None:
        error = error - (products_MKK @ sign_L @ sign_K).square().sum()
    return error, length


def _signs(size: int, whole: int, like: Tensor) -> Tensor | None:
    """+1 for one half of a side's rows, -1 for the other, 0 for one that is left over; None where
    the side is the identity."""
    if size == whole:
        return None
    half = size // 2
    sign_K = like.new_zeros(size)
    sign_K[:half], sign_K[half : 2 * half] = 1.0, -1.0
    return sign_K if half else sign_K.fill_(float("nan"))
