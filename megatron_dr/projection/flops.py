"""What scoring one weight's samples costs, in FLOPs (two per multiply-add).

N samples of L tokens, and the target: q samples of L tokens in the same batch, or q = 0 and the
target's own gradient [O, I] (its sketch, for `sketched`) from a pass of its own. Scoring ends
with the gram of N rows and the target, or where `gram` is off with their products alone.

FLOPs are not seconds: `exact` also writes and reads N O I numbers, which matters for short samples.

Shape letters: L tokens of a sample, N samples, I in, O out, K sketch.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_dr.projection.per_sample import block_rows

Score = Literal["ghost", "sketched", "exact"]

_WORTH = 0.1  # of the weight gradient: what exact numbers may cost more than a sketch's


@dataclass(frozen=True)
class Work:
    """One weight and its batch.

    :param out, inner: O and I, of this rank's shard.
    :param samples, tokens: N and L.
    :param targets: q.
    :param size_out, size_in: the most that K_out and K_in may be.
    :param gram: whether rows are multiplied with rows, as sets other than `topk` and `filter` need.
    """

    out: int
    inner: int
    samples: int
    tokens: int
    targets: int
    size_out: int
    size_in: int
    gram: bool


def weight_gradient(work: Work) -> int:
    """2 (N + q) L O I: the GEMM that runs anyway."""
    return 2 * _tokens(work) * work.out * work.inner


def ghost(work: Work) -> int:
    """Products of tokens with tokens, or of samples with a target gradient.

    With `gram`: T (T + block) (I + O + 1), T = (N + q) L. Each pair of tokens is multiplied once
    but within a block of them, where it is twice. Then, or without `gram`, with a target gradient
    2 T (O I + min(O, I)). Without both, what is less: 2 T q L (I + O + 1) for the target's tokens,
    or to form its gradient first.
    """
    tokens, sides = _tokens(work), work.inner + work.out
    cross = 2 * tokens * (work.inner * work.out + min(work.inner, work.out))
    own = work.targets * work.tokens
    if not work.gram:
        formed = 2 * own * work.inner * work.out + cross
        return min(2 * tokens * own * (sides + 1), formed) if own else cross
    flops = tokens * (tokens + min(tokens, block_rows())) * (sides + 1)
    return flops if own else flops + cross


def sketched(work: Work) -> int:
    """2 (N + q) L (O K_out + I K_in + K_out K_in), and products of K_out K_in numbers.

    A side that is not larger than its sketch is not projected.
    """
    k_out, k_in = min(work.out, work.size_out), min(work.inner, work.size_in)
    project = work.out * k_out * (work.out > k_out) + work.inner * k_in * (work.inner > k_in)
    return 2 * _tokens(work) * (project + k_out * k_in) + _products(work, k_out * k_in)


def exact(work: Work) -> int:
    """2 (N + q) L O I, and products of O I numbers."""
    return weight_gradient(work) + _products(work, work.out * work.inner)


def cheapest(work: Work) -> Score:
    """What `auto` means: the better numbers unless they cost noticeably more.

    Of `exact` and `ghost`, which both are without noise, the one with fewer FLOPs (`exact` if
    equal), if it takes at most a tenth of the weight gradient's more than `sketched` takes: about
    3% of the layer's forward and backward. Else `sketched`.
    """
    noiseless = min(exact(work), ghost(work))
    if noiseless > sketched(work) + _WORTH * weight_gradient(work):
        return "sketched"
    return "exact" if exact(work) == noiseless else "ghost"


def _tokens(work: Work) -> int:
    return (work.samples + work.targets) * work.tokens


def _products(work: Work, numbers: int) -> int:
    """Of rows and target, given as so many numbers each: all with all, or all with the target."""
    return 2 * (work.samples + 1) * (work.samples + 1 if work.gram else 1) * numbers
