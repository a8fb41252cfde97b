"""Factors of a weight's gradient, and the gradients by autograd, a sample at a time.

Shape suffixes: L tokens of a sample, N samples, I in, O out.
"""

from collections.abc import Sequence

import torch
from _samplers import generator, normal
from torch import Tensor
from torch.nn.functional import embedding, linear

from megatron_dr.projection.per_sample import Pair

KINDS = ["dense", "index", "tied", "twice"]
SHAPES = [(5, 4, 6, 3), (1, 1, 1, 1), (7, 3, 2, 9), (3, 6, 5, 5)]  # L, N, I, O


def dense(
    length: int, samples: int, inner: int, out: int, dtype: torch.dtype, seed: int = 0
) -> Pair:
    """Normal numbers; the last sample is padded, by rows of zeros."""
    x_LNI, dy_LNO = (normal(length, samples, k, seed=seed + k).to(dtype) for k in (inner, out + 99))
    x_LNI[length // 2 + 1 :, -1], dy_LNO[length // 2 + 1 :, -1] = 0, 0
    return x_LNI, dy_LNO[..., :out].contiguous()


def one_hot(
    length: int, samples: int, inner: int, out: int, dtype: torch.dtype, seed: int = 0
) -> Pair:
    """Row numbers, -1 among them; repeated within a sample and between samples."""
    x_LNI = normal(length, samples, inner, seed=seed + 7).to(dtype)
    return x_LNI, torch.randint(-1, out, (length, samples), generator=generator(seed + 8))


def pairs(kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Pair]:
    """All uses of one weight; a second use has more tokens."""
    longer = (shape[0] + 2, *shape[1:])
    return {
        "dense": [dense(*shape, dtype)],
        "index": [one_hot(*shape, dtype)],
        "tied": [dense(*shape, dtype), one_hot(*longer, dtype)],
        "twice": [dense(*shape, dtype), dense(*longer, dtype, seed=1)],
    }[kind]


def by_autograd(uses: Sequence[Pair], out: int) -> Tensor:
    """G_n [N, O, I] in float64: of sum(y dy) with y = x W^T, or of sum(W[index] x)."""
    gradients = []
    for n in range(uses[0][0].shape[1]):
        weight = torch.zeros(out, uses[0][0].shape[2], dtype=torch.float64, requires_grad=True)
        loss = weight.new_zeros(())
        for x_LNI, dy in uses:
            x_LI = x_LNI[:, n].double()
            if dy.is_floating_point():
                loss = loss + (linear(x_LI, weight) * dy[:, n].double()).sum()
            else:
                of_this = dy[:, n] >= 0
                loss = loss + (embedding(dy[of_this, n], weight) * x_LI[of_this]).sum()
        gradients.append(torch.autograd.grad(loss, weight)[0])
    return torch.stack(gradients)
