"""Gradients of single samples inside a linear layer: their products, mostly without forming them.

A weight [O, I] that is used as Y = X W^T has, of sample n with L tokens, the gradient

    G_n = sum over l of dy[l, n]^T x[l, n]                                          [O, I]

A *pair* holds the two factors: `x_LNI` and `dy`. dy is `dy_LNO`, or, where its rows are one-hot,
the row numbers `index_LN` (int64; -1: a row of zeros). So an embedding's weight is a linear one
too: index is the token, x the gradient of the embedding's output. A weight that is used several
times (tied embeddings) has several pairs, whose G_n add up before any product.

The factors may be bf16 or fp16; products and sums are in fp32. Padded tokens are rows of zeros.
Scoring without forming gradients: Wang, Mittal, Song, Jia, Data Shapley in One Training Run,
arXiv 2406.11011 (ghost); sketches of the two factors: Choe et al., arXiv 2405.13954 (LoGra).

Shape suffixes: L tokens of a sample, N samples, T tokens of all samples, I in, O out, K sketch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]

BLOCK = 64 * 2**20  # bytes of the products that `ghost_gram` and `ghost_cross` hold at a time
_FP32_RESULT = torch.torch_version.TorchVersion(torch.__version__) >= "2.8"  # of bf16 factors
_HALF = (torch.bfloat16, torch.float16)


def by_sample(x_T: Tensor, sample_T: Tensor, num: int, pad: float = 0) -> Tensor:
    """Tokens [T, ...] in any order to [L, N, ...], L the largest count; their order is kept.

    One look at the values (how many tokens), for which the host waits.

    :param sample_T: each token's sample number below `num` (int64); negative: of none.
    :param pad: where a sample has fewer than L tokens; -1 for row numbers.
    :raises ValueError: a sample number that is not below `num`.
    """
    sorted_T, order_T = sample_T.sort(stable=True)
    start_N = torch.searchsorted(sorted_T, torch.arange(num + 1, device=sample_T.device))
    sizes = torch.stack([start_N.diff().amax(), start_N[0], start_N[-1]])
    length, first, end = sizes.tolist()
    if end != len(sample_T):
        raise ValueError(f"a token's sample number is not below {num}, the number of samples.")
    sorted_T, order_T = sorted_T[first:], order_T[first:]
    place_T = torch.arange(first, end, device=sample_T.device) - start_N[sorted_T]
    out_LN = x_T.new_full((length, num, *x_T.shape[1:]), pad)
    out_LN[place_T, sorted_T] = x_T[order_T]
    return out_LN


def gradients(x_LNI: Tensor, dy: Tensor, out: int) -> Tensor:
    """G_n [N, O, I] in fp32: `exact`. A one-hot dY's are dense too.

    :param out: O.
    """
    if dy.is_floating_point():
        return _summed(dy, x_LNI)
    samples, inner = x_LNI.shape[1:]
    row_LN = torch.arange(samples, device=dy.device) * out + dy.clamp(min=0)
    own_LNI = x_LNI.float().masked_fill((dy < 0)[..., None], 0.0)
    g_RI = x_LNI.new_zeros((samples * out, inner), dtype=torch.float32)
    g_RI.index_add_(0, row_LN.flatten(), own_LNI.flatten(0, 1))
    return g_RI.view(samples, out, inner)


def ghost_gram(pairs: Sequence[Pair]) -> Tensor:
    """<G_i, G_j> [N, N] in fp32: sum over l, m of (x[l,i] . x[m,j]) (dy[l,i] . dy[m,j]).

    Exact, and symmetric bit for bit. A block of tokens with a block at a time, each with at least
    a token of every sample; float64 between blocks.
    """
    samples = pairs[0][0].shape[1]
    length = max(1, block_rows() // max(1, samples))
    blocks = [
        block
        for x_LNI, dy in pairs
        for block in zip(torch.split(x_LNI, length), torch.split(dy, length), strict=True)
    ]
    gram_NN = pairs[0][0].new_zeros((samples, samples), dtype=torch.float64)
    for n, left in enumerate(blocks):
        gram_NN += _block_gram(left, left)
        for right in blocks[:n]:
            gram_NN += 2.0 * _block_gram(left, right)  # and its transpose, below
    return ((gram_NN + gram_NN.t()) / 2).float()


def ghost_cross(pairs: Sequence[Pair], target_OI: Tensor) -> Tensor:
    """<G_n, T> [N] in fp32, T [O, I] any matrix: sum over l of dy[l, n] . T x[l, n].

    The larger of the two sides meets T, so that what is multiplied and summed is the smaller.
    """
    cross_N = pairs[0][0].new_zeros(pairs[0][0].shape[1], dtype=torch.float64)
    for x_LNI, dy in pairs:
        samples, inner = x_LNI.shape[1:]
        tokens = max(1, BLOCK // (4 * samples * max(inner, len(target_OI)) or 1))  # at a time
        parts = zip(torch.split(x_LNI, tokens), torch.split(dy, tokens), strict=True)
        for some_LNI, some_dy in parts:
            if not dy.is_floating_point():
                y_LNI = target_OI[some_dy.clamp(min=0)].float().mul_(some_LNI)
                cross_N += y_LNI.sum(2).masked_fill_(some_dy < 0, 0.0).sum(0)
            elif inner > len(target_OI):
                y_TO = _product(some_LNI.flatten(0, 1), target_OI.t())
                cross_N += y_TO.view(some_dy.shape).mul_(some_dy).sum((0, 2))
            else:
                y_TI = _product(some_dy.flatten(0, 1), target_OI)
                cross_N += y_TI.view(some_LNI.shape).mul_(some_LNI).sum((0, 2))
    return cross_N.float()


def ghost_between(pairs: Sequence[Pair], others: Sequence[Pair]) -> Tensor:
    """<G_n, sum over v of G'_v> [N] in fp32, G' the gradients of the samples in `others`.

    As `ghost_gram`, token by token: cheaper than `ghost_cross` where the others have fewer tokens
    than O I / (O + I).
    """
    samples = pairs[0][0].shape[1]
    cross_N = pairs[0][0].new_zeros(samples, dtype=torch.float64)
    rows = [(x.flatten(0, 1), dy.flatten(0, 1)) for x, dy in others]
    for x_SI, dy_S in (
        (x[start : start + block_rows()], dy[start : start + block_rows()])
        for x, dy in rows
        for start in range(0, len(x), block_rows())
    ):
        length = max(1, BLOCK // (8 * samples * len(x_SI) or 1))
        for x_LNI, dy in pairs:
            for start in range(0, len(x_LNI), length):
                x_TI, dy_T = (p[start : start + length].flatten(0, 1) for p in (x_LNI, dy))
                products_TS = _product(x_TI, x_SI.t()).mul_(_agreement(dy_T, dy_S))
                cross_N += products_TS.view(-1, samples, len(x_SI)).sum((0, 2))
    return cross_N.float()


def sketch(pairs: Sequence[Pair], p_out_KO: Tensor | None, p_in_KI: Tensor | None) -> Tensor:
    """P_out G_n P_in^T, flattened [N, K_out K_in], in fp32: (P_out dY_n^T)(P_in X_n^T)^T.

    Of a shard of the weight, with the shard's columns of P_out and P_in, it is a partial sum.

    :param p_out_KO: None is the identity, with K_out = O; not for row numbers, which look up its
        columns.
    :param p_in_KI: None is the identity.
    :raises ValueError: row numbers without p_out_KO.
    """
    c_NKK: Tensor | None = None
    for x_LNI, dy in pairs:
        part_NKK = _summed(_projected(dy, p_out_KO), _projected(x_LNI, p_in_KI))
        c_NKK = part_NKK if c_NKK is None else c_NKK.add_(part_NKK)
    assert c_NKK is not None, "no pair"
    return c_NKK.flatten(1)


@dataclass(frozen=True, eq=False)
class Weighted:
    """sum over n of a_n G_n = dy^T x: its factors x [T, I] and dy [T, O], or its value.

    To be unpacked as (x, dy), made when first looked at: the narrower of them is scaled, in fp32,
    and rounded to its own dtype once.

    :param coefficient_N: a, of all samples; None: all are 1, and without keep_N the factors are
        views.
    :param keep_N: numbers (int64) of the samples that enter; None: all. Without those that
        have a = 0, the product is as much smaller.
    """

    x_LNI: Tensor
    dy_LNO: Tensor
    coefficient_N: Tensor | None
    keep_N: Tensor | None

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._factors)

    def __getitem__(self, number: int) -> Tensor:
        return self._factors[number]

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        x_LNI, dy_LNO, a_N, keep_N = self.x_LNI, self.dy_LNO, self.coefficient_N, self.keep_N
        if keep_N is not None:
            x_LNI, dy_LNO = x_LNI.index_select(1, keep_N), dy_LNO.index_select(1, keep_N)
        if a_N is not None:
            a_N = a_N if keep_N is None else a_N.index_select(0, keep_N)
            a_N1 = a_N.to(dy_LNO.device, torch.float32)[:, None]
            if x_LNI.shape[2] < dy_LNO.shape[2] and x_LNI.dtype == dy_LNO.dtype:
                x_LNI = torch.mul(x_LNI, a_N1, out=torch.empty_like(x_LNI))
            else:
                dy_LNO = torch.mul(dy_LNO, a_N1, out=torch.empty_like(dy_LNO))
        return x_LNI.flatten(0, 1), dy_LNO.flatten(0, 1)

    def product(self) -> Tensor:
        """dy^T x [O, I], in x's dtype.

        In fp32 on the CPU a GEMM per sample, where it lies: BLAS strides over the tokens of the
        others, so that nothing is copied or scaled. Elsewhere one GEMM of the factors.
        """
        x_LNI, dy_LNO = self.x_LNI, self.dy_LNO
        in_place = x_LNI.device.type == "cpu" and x_LNI.dtype == dy_LNO.dtype == torch.float32
        if not in_place or self.coefficient_N is None:
            x_TI, dy_TO = self
            return dy_TO.t() @ x_TI
        samples = range(x_LNI.shape[1]) if self.keep_N is None else self.keep_N.tolist()
        scale = self.coefficient_N.tolist()
        g_OI = x_LNI.new_zeros(dy_LNO.shape[2], x_LNI.shape[2])
        for n in samples:
            g_OI.addmm_(dy_LNO[:, n].t(), x_LNI[:, n], alpha=scale[n])
        return g_OI


def block_rows() -> int:
    """Tokens in a block of `ghost_gram`: two fp32 squares of so many fill `BLOCK` bytes."""
    return math.isqrt(BLOCK // 8)


def _block_gram(left: Pair, right: Pair) -> Tensor:
    """[N, N]: products of the tokens of two blocks, summed over the tokens of each sample."""
    lengths, samples = (len(left[0]), len(right[0])), left[0].shape[1]
    (x_SI, dy_S), (x_TI, dy_T) = ((x.flatten(0, 1), dy.flatten(0, 1)) for x, dy in (left, right))
    products_ST = _product(x_SI, x_TI.t()).mul_(_agreement(dy_S, dy_T))
    return products_ST.view(lengths[0], samples, lengths[1], samples).sum((0, 2))


def _agreement(dy_S: Tensor, dy_T: Tensor) -> Tensor:
    """dy_s . dy_t [S, T], each dY dense [., O] or row numbers [.]."""
    if dy_S.is_floating_point() and dy_T.is_floating_point():
        return _product(dy_S, dy_T.t())
    if dy_S.is_floating_point():
        return dy_S.index_select(1, dy_T.clamp(min=0)).masked_fill_(dy_T < 0, 0.0)
    if dy_T.is_floating_point():
        return _agreement(dy_T, dy_S).t()
    return (dy_S[:, None] == dy_T).logical_and_((dy_S >= 0)[:, None])


def _projected(x_LNI: Tensor, p_KI: Tensor | None) -> Tensor:
    """P x [L, N, K] in fp32, or x itself; x may be row numbers."""
    if x_LNI.is_floating_point():
        if p_KI is None:
            return x_LNI
        return _product(x_LNI.flatten(0, 1), p_KI.t()).view(*x_LNI.shape[:2], len(p_KI))
    if p_KI is None:
        raise ValueError("row numbers look up P_out's columns; pass the identity as a matrix.")
    columns_KT = p_KI.index_select(1, x_LNI.flatten().clamp(min=0))
    columns_KT = columns_KT.float().masked_fill_(x_LNI.flatten() < 0, 0.0)
    return columns_KT.view(len(p_KI), *x_LNI.shape).permute(1, 2, 0)


def _summed(a_LNA: Tensor, b_LNB: Tensor) -> Tensor:
    """sum over l of a[l, n]^T b[l, n], [N, A, B] in fp32."""
    return _product(a_LNA.permute(1, 2, 0), b_LNB.permute(1, 0, 2))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32, of matrices or of batches of them.

    On a GPU, factors in half precision stay so: their products are exact in fp32. The fp32
    partner of a bf16 factor is split into two bf16 ones: a product in fp32 would be much slower.
    """
    if a.is_cuda and _FP32_RESULT:
        if a.dtype == b.dtype and a.dtype in _HALF:
            multiply = torch.mm if a.dim() == 2 else torch.bmm
            return multiply(a, b, out_dtype=torch.float32)
        if (a.dtype, b.dtype) == (torch.bfloat16, torch.float32):
            high, low = _split(b)
            return _product(a, high).add_(_product(a, low))
        if (a.dtype, b.dtype) == (torch.float32, torch.bfloat16):
            high, low = _split(a)
            return _product(high, b).add_(_product(low, b))
    return a.float() @ b.float()


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 x = high + low, both bf16, to 2^-17 of each element."""
    high = x.bfloat16()
    return high, (x - high).bfloat16()
