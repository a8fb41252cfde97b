"""A linear map S that keeps inner products, E[(Sx).(Sy)] = x.y, without a stored matrix.

A sketch is added to, a piece at a time: S is linear, and bucket and sign depend only on the
parameter's key and the element's global index. So the result does not depend on how the elements
lie on ranks or are split over calls (up to the order of fp32 additions).

Shape suffixes: M rows, N elements, K sketch size, B blocks, R = M + 1 (rows plus target).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = Tensor | Sequence[Tensor]  # R vectors of N elements, stacked or not


@dataclass(frozen=True)
class CountSketch:
    """(Sx)[k] = sum of sign(n) x[n] over the elements n with bucket(n) = k.

    Charikar, Chen, Farach-Colton, Finding frequent items in data streams, ICALP 2002. The
    estimate (Sx).(Sy) is unbiased with variance at most (|x|^2 |y|^2 + (x.y)^2) / K.

    :param size: K, a power of two up to 2^31.
    :param seed: another seed, another independent map.
    """

    size: int
    seed: int

    def __post_init__(self) -> None:
        if not (0 < self.size <= 2**31 and self.size & (self.size - 1) == 0):
            raise ValueError(f"size is {self.size}; it must be a power of two, at most 2^31.")

    def add_(self, out_RK: Tensor, values_RN: Rows, index_N: Tensor, key: int) -> None:
        """out[:, bucket(index)] += sign(index) values, in fp32, a row at a time: out += S values.

        :param index_N: numbers (int64) of the elements of the parameter `key`.

        On the CPU each bucket adds in the order of index, with any number of threads; on a GPU in
        no fixed order, unless `torch.use_deterministic_algorithms` is on.
        """
        hashed_N = hash_bits(index_N, *salts(key, self.seed))
        # bit 31 is a float's sign, and 0x3F800000 is 1.0: where it is set -1.0, else +1.0
        sign_N = hashed_N.bitwise_and(-(2**31)).bitwise_or_(0x3F800000).view(torch.float32)
        sign_N = sign_N.to(out_RK.dtype)
        bucket_N = hashed_N.bitwise_and_(self.size - 1).long()  # the low bits
        for out_K, values_N in zip(out_RK, values_RN, strict=True):
            # not index_add_, which does the same in twice the time on a CPU
            out_K.scatter_add_(0, bucket_N, sign_N * values_N)


def key_of(name: str) -> int:
    """A parameter's stable 63-bit key."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def salts(key: int, seed: int) -> tuple[int, int]:
    """Two independent int32 from (key, seed), by a cryptographic hash on the host."""
    digest = hashlib.blake2b(f"{key}/{seed}".encode(), digest_size=8).digest()
    first, second = (int.from_bytes(d, "big", signed=True) for d in (digest[:4], digest[4:]))
    return first, second


def hash_bits(index_N: Tensor, first: int, second: int) -> Tensor:
    """32 hashed bits (int32) of a 64-bit index; salted before each of two finalisers."""
    low_N, high_N = index_N.to(torch.int32), (index_N >> 32).to(torch.int32)
    mixed_N = _finalise_(low_N.bitwise_xor_(first))
    return _finalise_(mixed_N.add_(second).bitwise_xor_(high_N))


def _finalise_(x_N: Tensor) -> Tensor:
    """A 32-bit finaliser in place: a bijection with near-ideal avalanche.

    Its two multipliers are from the hash-prospector project's list. int32 products keep their low
    32 bits; its right shift copies the sign, so that the copies are masked off.
    """
    x_N.bitwise_xor_((x_N >> 16).bitwise_and_(0xFFFF)).mul_(0x21F0AAAD)
    x_N.bitwise_xor_((x_N >> 15).bitwise_and_(0x1FFFF)).mul_(0x735A2D97)
    return x_N.bitwise_xor_((x_N >> 15).bitwise_and_(0x1FFFF))
