"""The Kronecker sketch of a linear layer's gradient: C = P_out G P_in^T, from its two factors.

    E[<C_i, C_j>] = <G_i, G_j> ,    P = signs / sqrt(K), P_out and P_in independent

(Choe et al., arXiv 2405.13954, LoGra.) The variance of <C_i, C_j> is at most
|G_i|^2 |G_j|^2 (2/K_out + 2/K_in + 4/(K_out K_in)), which gradients of rank one reach: a side's
noise falls with its own size alone, so that K_out K_in numbers are worth far fewer of a
`CountSketch`. Signs have a lower variance than
normal numbers for every pair of gradients (an entry's fourth moment is 1, not 3), from a few per
cent to all of it for gradients of few large elements; and they are exact in bf16 where K is a
power of four.

Shape suffixes: I in, O out, K sketch, T entries asked for.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_dr.projection.sketch import hash_bits, key_of, salts


@dataclass(frozen=True)
class Kronecker:
    """P_out [K_out, O] and P_in [K_in, I] of one weight; a side that is not larger than its size
    is left as it is (the identity).

    A column depends on (name, side, seed) and its number alone, so a shard of the weight makes its
    own, and the sketches of all shards add up to the whole weight's.

    :param name: the parameter's global name.
    :param out, inner: O and I of the whole weight.
    :param size_out, size_in: the most that K_out and K_in may be.
    :param seed: another seed, another independent sketch.
    :raises ValueError: a length that is not positive.
    """

    name: str
    out: int
    inner: int
    size_out: int
    size_in: int
    seed: int

    def __post_init__(self) -> None:
        for field in ("out", "inner", "size_out", "size_in"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")

    def columns(
        self, side: Literal["out", "in"], index: Tensor | None, device: torch.device | str,
        dtype: torch.dtype,
    ) -> Tensor | None:  # fmt: skip
        """P_out's columns [K_out, T] for the weight's rows `index` (int64, of the whole weight),
        or P_in's [K_in, T] for its columns.

        :param index: None: all of them, and if P is the identity the result is None too. Of
            an identity's shard the columns are returned, so that sketches add up over shards.
        """
        of_out = side == "out"
        length, size = (self.out, self.size_out) if of_out else (self.inner, self.size_in)
        if length <= size:
            if index is None:
                return None
            numbers_K1 = torch.arange(length, device=device)[:, None]
            return (numbers_K1 == index.to(device)).to(dtype)
        if index is None:
            index = torch.arange(length, device=device)
        key = key_of(f"{self.name}/{side}")
        return _signs(key, self.seed, size, index.to(device)).to(dtype).mul_(size**-0.5)


def sizes_for(
    error: float, out: int, inner: int, size_out: int | None = None, size_in: int | None = None
) -> tuple[int, int]:
    """The fewest numbers, K_out K_in, with an expected error of at most `error`:

        (1 + 2/K_out) (1 + 2/K_in) - 1  <=  error^2

    Then sqrt(E (<C_i, C_j> - <G_i, G_j>)^2) <= error |G_i| |G_j| for any two gradients. Sizes are
    multiples of 32; a side that would not be smaller than the weight's is the identity, which has
    no noise and is not multiplied.

    :param error: relative to the two lengths, above 0 and below 1.
    :param size_out, size_in: given sides; beside one the other has the size of an even share.
    :raises ValueError: another error.
    """
    if not 0.0 < error < 1.0:
        raise ValueError(f"error is {error}; it must lie between 0 and 1.")
    whole = 1.0 + error**2
    even, alone = _side(math.sqrt(whole)), _side(whole)
    if size_out is not None or size_in is not None:
        return min(size_out or even, out), min(size_in or even, inner)
    pairs = [(even, even), (out, min(alone, inner)), (min(alone, out), inner)]
    fitting = [pair for pair in pairs if pair[0] <= out and pair[1] <= inner]
    return min(fitting, key=math.prod)


def _side(share: float) -> int:
    """The least multiple of 32, K, with 1 + 2/K <= share."""
    return 32 * math.ceil(2.0 / (share - 1.0) / 32 - 1e-9)


def _signs(key: int, seed: int, size: int, index_T: Tensor) -> Tensor:
    """Independent signs [K, T] as int32: 32 of a column from each hash of (column, word)."""
    words = -(-size // 32)
    word_W1 = torch.arange(words, device=index_T.device)[:, None]
    hashed_WT = hash_bits(index_T * words + word_W1, *salts(key, seed))
    shift_S1 = torch.arange(32, device=index_T.device, dtype=torch.int32)[:, None]
    bits_WST = (hashed_WT[:, None] >> shift_S1).bitwise_and_(1)
    return bits_WST.flatten(0, 1)[:size].mul_(-2).add_(1)
