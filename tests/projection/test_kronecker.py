"""Kronecker sketches keep inner products, and do not depend on how a weight is sharded."""

import dataclasses
import hashlib

import pytest
import torch
from _pairs import by_autograd, dense, one_hot, pairs
from _samplers import generator, normal
from torch import Tensor

from megatron_dr.projection import Kronecker, key_of, per_sample

FP32 = torch.float32


def kronecker(seed: int = 1, size_out: int = 4, size_in: int = 8, name: str = "w") -> Kronecker:
    return Kronecker(name, 40, 24, size_out, size_in, seed)


def sides(sketch: Kronecker) -> tuple[Tensor | None, Tensor | None]:
    return sketch.columns("out", None, "cpu", FP32), sketch.columns("in", None, "cpu", FP32)


def gram(sketch: Kronecker, g_NOI: Tensor) -> Tensor:
    p_out, p_in = (
        torch.eye(n) if p is None else p
        for p, n in zip(sides(sketch), g_NOI.shape[1:], strict=True)
    )
    c_NK = (p_out.double() @ g_NOI @ p_in.double().t()).flatten(1)
    return c_NK @ c_NK.t()


def gradients(kind: str) -> Tensor:
    """Three G [40, 24]: of many tokens, of one token, or of one large element each."""
    if kind == "dense":
        return normal(3, 40, 24, seed=1) + normal(40, 24, seed=2)
    if kind == "rank_one":
        return normal(3, 40, 1, seed=1) @ normal(3, 1, 24, seed=2)
    g_NOI = torch.zeros(3, 40, 24, dtype=torch.float64)
    g_NOI[torch.arange(3), torch.tensor([3, 3, 7]), torch.tensor([5, 9, 5])] = 2.0
    return g_NOI


@pytest.mark.parametrize("kind", ["dense", "rank_one", "sparse"])
def test_unbiased_with_the_stated_variance(kind: str) -> None:
    """Over seeds: the mean within four standard errors, the variance at most 1.3 of the bound."""
    g_NOI, seeds = gradients(kind), 600
    g_NK = g_NOI.flatten(1)
    exact_NN, norm_sq_N = g_NK @ g_NK.t(), (g_NK**2).sum(1)
    grams = torch.stack([gram(kronecker(seed), g_NOI) for seed in range(seeds)])
    bound_NN = norm_sq_N[:, None] * norm_sq_N * (2 / 4 + 2 / 8 + 4 / 32)
    assert ((grams.mean(0) - exact_NN).abs() <= 4 * (bound_NN / seeds).sqrt()).all()
    assert (grams.var(0) <= 1.3 * bound_NN).all()


def normal_grams(g_NOI: Tensor, seeds: int) -> Tensor:
    grams = []
    for seed in range(seeds):
        p_out, p_in = normal(4, 40, seed=2 * seed) / 2, normal(8, 24, seed=2 * seed + 1) / 8**0.5
        c_NK = (p_out @ g_NOI @ p_in.t()).flatten(1)
        grams.append(c_NK @ c_NK.t())
    return torch.stack(grams)


@pytest.mark.parametrize("kind", ["dense", "rank_one", "sparse"])
def test_signs_have_a_lower_variance_than_normal_numbers(kind: str) -> None:
    g_NOI, seeds = gradients(kind), 600
    signs = torch.stack([gram(kronecker(seed), g_NOI) for seed in range(seeds)]).var(0)
    assert signs.diagonal().sum() < normal_grams(g_NOI, seeds).var(0).diagonal().sum()
    if kind == "sparse":  # an element's square is kept exactly
        assert signs.diagonal().max() < 1e-20


@pytest.mark.parametrize("size", [1, 4, 32, 33, 100])
def test_signs_are_the_stated_ones(size: int) -> None:
    """Sign k of column n is bit k mod 32 of a hash of n words + k div 32, in Python's integers."""

    def finalise(x: int) -> int:
        x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
        x = (x ^ x >> 15) * 0x735A2D97 % 2**32
        return x ^ x >> 15

    key, words = key_of("w/out"), -(-size // 32)
    digest = hashlib.blake2b(f"{key}/7".encode(), digest_size=8).digest()
    first, second = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")
    index_T = torch.tensor([0, 1, 77, 200_000, 2**31 + 5])
    p_KT = Kronecker("w", 2**32, 1, size, 1, 7).columns("out", index_T, "cpu", FP32)
    assert p_KT is not None and p_KT.shape == (size, 5)
    for t, n in enumerate(index_T.tolist()):
        for k in range(size):
            word = n * words + k // 32
            hashed = finalise((finalise(word % 2**32 ^ first) + second) % 2**32 ^ word >> 32)
            sign = -1.0 if hashed >> k % 32 & 1 else 1.0
            assert p_KT[k, t] == torch.tensor(sign * size**-0.5)


def test_signs_are_independent() -> None:
    """Rows, columns and both sides: correlations as small as chance makes them."""
    p_KT = Kronecker("w", 4096, 4096, 64, 64, 1).columns("out", None, "cpu", FP32)
    other_KT = Kronecker("w", 4096, 4096, 64, 64, 1).columns("in", None, "cpu", FP32)
    assert p_KT is not None and other_KT is not None
    rows_KK = p_KT @ p_KT.t() * 64 / 4096 - torch.eye(64)
    assert rows_KK.abs().max() < 5 / 64 and abs(rows_KK.square().sum() / (64 * 63) * 4096 - 1) < 0.1
    columns_TT = p_KT.t() @ p_KT - torch.eye(4096)
    assert abs(columns_TT.square().mean() * 64 - 1) < 0.02
    assert (p_KT @ other_KT.t()).abs().max() * 64 / 4096 < 5 / 64
    assert abs(p_KT.sum()) * 8 < 4 * (64 * 4096) ** 0.5


def test_deterministic_and_another_for_each_name_side_and_seed() -> None:
    square = [Kronecker(name, 40, 40, 8, 8, seed) for name, seed in (("a", 1), ("a", 2), ("b", 1))]
    made = [p for s in square for p in sides(s) if p is not None]
    assert len(made) == 6
    assert all(not torch.equal(p, q) for n, p in enumerate(made) for q in made[:n])
    assert all(torch.equal(p, q) for s in square for p, q in zip(sides(s), sides(s), strict=True))


def test_columns_do_not_depend_on_who_asks() -> None:
    p_KO = kronecker().columns("out", None, "cpu", FP32)
    assert p_KO is not None
    index_T = torch.randperm(40, generator=generator(1))[:17]
    shard_KT = kronecker().columns("out", index_T, "cpu", FP32)
    assert shard_KT is not None and torch.equal(shard_KT, p_KO[:, index_T])
    in_bf16 = kronecker().columns("out", index_T, "cpu", torch.bfloat16)  # 4 is a power of four
    assert in_bf16 is not None and torch.equal(in_bf16.float(), shard_KT)


@pytest.mark.parametrize("size_out, size_in", [(40, 8), (4, 24), (64, 64), (4, 8)])
def test_a_small_side_is_left_as_it_is(size_out: int, size_in: int) -> None:
    sketch = kronecker(size_out=size_out, size_in=size_in)
    p_out, p_in = sides(sketch)
    assert (p_out is None) == (size_out >= 40) and (p_in is None) == (size_in >= 24)
    c_NK = per_sample.sketch(pairs("dense", (5, 3, 24, 40), FP32), p_out, p_in)
    assert c_NK.shape == (3, min(size_out, 40) * min(size_in, 24))
    columns_KT = sketch.columns("out", torch.tensor([3, 0]), "cpu", FP32)
    assert columns_KT is not None
    if p_out is None:
        assert torch.equal(columns_KT, torch.eye(40)[:, [3, 0]])


def whole(values: Tensor) -> Tensor:
    """Small integers: every sum of them is exact."""
    return (values * 2).round()


@pytest.mark.parametrize("size_out, size_in", [(4, 16), (64, 16), (4, 64), (64, 64)])
@pytest.mark.parametrize("dim", [0, 1])
def test_sketches_of_shards_add_up(size_out: int, size_in: int, dim: int) -> None:
    """Bit for bit, in uneven shards; a shard of a vocabulary sees -1 for another's tokens."""
    sketch = kronecker(size_out=size_out, size_in=size_in)
    x_LNI, dy_LNO = (whole(t) for t in dense(5, 3, 24, 40, FP32))
    z_LNI, index_LN = one_hot(6, 3, 24, 40, FP32)
    z_LNI = whole(z_LNI)
    total_NK = torch.zeros(3, min(size_out, 40) * min(size_in, 24))
    for index_T in torch.randperm((40, 24)[dim], generator=generator(1)).split(15):
        rows, columns = (index_T, torch.arange(24)) if dim == 0 else (torch.arange(40), index_T)
        match_LNT = index_LN[..., None] == rows
        local_LN = torch.where(match_LNT.any(2), match_LNT.int().argmax(2), -1)
        uses = [(x_LNI[..., columns], dy_LNO[..., rows]), (z_LNI[..., columns], local_LN)]
        p_out = sketch.columns("out", rows, "cpu", FP32)
        total_NK += per_sample.sketch(uses, p_out, sketch.columns("in", columns, "cpu", FP32))
    g_NOI = by_autograd([(x_LNI, dy_LNO), (z_LNI, index_LN)], 40)
    p_out, p_in = sides(sketch)
    p_out, p_in = torch.eye(40) if p_out is None else p_out, torch.eye(24) if p_in is None else p_in
    expected = (p_out.double() @ g_NOI @ p_in.double().t()).flatten(1)
    assert torch.equal(total_NK.double(), expected)


@pytest.mark.parametrize("field", ["out", "inner", "size_out", "size_in"])
def test_refuses_what_is_not_positive(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is 0"):
        dataclasses.replace(kronecker(), **{field: 0})
