"""Sketches are linear, do not depend on the split, and keep inner products."""

import hashlib

import pytest
import torch
from _samplers import normal

from megatron_dr.projection import CountSketch, gram_of, key_of, split

KEY, OTHER = key_of("decoder.layers.0.mlp.linear_fc1.weight"), key_of("output_layer.weight")


def sketch(s: CountSketch, values_RN: torch.Tensor, key: int = KEY, start: int = 0) -> torch.Tensor:
    out_RK = torch.zeros(len(values_RN), s.size)
    s.add_(out_RK, values_RN, torch.arange(start, start + values_RN.shape[1]), key)
    return out_RK


def integers(*shape: int, seed: int) -> torch.Tensor:
    """Small integers as fp32: every sum of them is exact."""
    return (normal(*shape, seed=seed) * 8).round().float()


def test_linear() -> None:
    s, x, y = CountSketch(64, 1), integers(3, 1000, seed=1), integers(3, 1000, seed=2)
    assert torch.equal(sketch(s, 2 * x - 3 * y), 2 * sketch(s, x) - 3 * sketch(s, y))


def test_split_does_not_matter() -> None:
    """In pieces, in any order, with gaps: as the shards of a tensor-parallel layout come."""
    s, x = CountSketch(64, 1), integers(2, 999, seed=1)
    out, order = torch.zeros(2, 64), torch.randperm(999, generator=torch.Generator().manual_seed(0))
    for piece in order.split(100):
        s.add_(out, x[:, piece], piece, KEY)
    assert torch.equal(out, sketch(s, x))


def test_rows_need_not_be_stacked() -> None:
    s, x = CountSketch(64, 1), integers(2, 999, seed=1)
    out = torch.zeros(2, 64)
    s.add_(out, [x[0], x[1]], torch.arange(999), KEY)
    assert torch.equal(out, sketch(s, x))


def test_low_precision_values_are_summed_in_fp32() -> None:
    s, x = CountSketch(16, 1), normal(1, 5000, seed=1).bfloat16()
    assert torch.equal(sketch(s, x), sketch(s, x.float()))


def test_unbiased_with_the_stated_variance() -> None:
    """Over seeds: the mean within four standard errors, the variance at most 1.3 of the bound."""
    size, seeds = 32, 400
    rows = normal(3, 200, seed=1).float()
    rows[1] = rows[0] + 0.5 * rows[1]
    exact = gram_of(rows[None])[0]
    sketches = torch.stack([sketch(CountSketch(size, seed), rows) for seed in range(seeds)])
    grams = gram_of(sketches)
    bound = (exact.diagonal()[:, None] * exact.diagonal() + exact**2) / size
    assert ((grams.mean(0) - exact).abs() <= 4 * (bound / seeds).sqrt()).all()
    assert (grams.var(0) <= 1.3 * bound).all()


@pytest.mark.parametrize("start, stride", [(0, 1), (0, 4096), (2**33, 1), (7, 2**20)])
def test_consecutive_elements_spread(start: int, stride: int) -> None:
    """Buckets fill evenly (chi-square) and signs cancel, for runs and for strided indices."""
    count, size = 2**14, 64
    index, ones = start + stride * torch.arange(count), torch.ones(1, count)
    signed = torch.zeros(1, size)
    CountSketch(size, 3).add_(signed, ones, index, KEY)
    # each bucket's sum of signs has variance count/size
    statistic = (signed**2).sum() / (count / size)
    assert abs(statistic - size) < 5 * (2 * size) ** 0.5
    assert abs(signed.sum()) < 4 * count**0.5


def test_buckets_fill_evenly() -> None:
    """One element at a time: its bucket and sign; pairs collide once in `size`."""
    size, count = 16, 512
    single = torch.zeros(count, size)
    for n in range(count):
        CountSketch(size, 3).add_(single[n : n + 1], torch.ones(1, 1), torch.tensor([n]), KEY)
    filled = single.abs().sum(0)
    assert single.abs().sum() == count
    assert ((filled - count / size) ** 2 / (count / size)).sum() < 40  # chi-square, 15 degrees
    pairs = (gram_of(single[None])[0] != 0).sum() - count
    assert abs(pairs / (count * (count - 1)) - 1 / size) < 0.01


def test_keys_and_seeds_are_independent() -> None:
    ones = torch.ones(1, 4096)
    a = sketch(CountSketch(256, 1), ones)
    for b in (sketch(CountSketch(256, 2), ones), sketch(CountSketch(256, 1), ones, OTHER)):
        assert not torch.equal(a, b)
        assert abs((a * b).sum() / (a.norm() * b.norm())) < 4 / 16
    assert torch.equal(a, sketch(CountSketch(256, 1), ones))


def reference(size: int, seed: int, key: int, index: int) -> tuple[int, float]:
    """Bucket and sign of one element, in Python's integers."""

    def finalise(x: int) -> int:
        x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
        x = (x ^ x >> 15) * 0x735A2D97 % 2**32
        return x ^ x >> 15

    digest = hashlib.blake2b(f"{key}/{seed}".encode(), digest_size=8).digest()
    first, second = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")
    mixed = finalise(index % 2**32 ^ first)
    hashed = finalise((mixed + second) % 2**32 ^ index >> 32)
    return hashed % size, -1.0 if hashed >> 31 else 1.0


@pytest.mark.parametrize("start", [0, 2**31 - 40, 2**32 - 40, 2**33 + 5, 2**63 - 77])
@pytest.mark.parametrize("size", [1, 64, 2**16])
def test_map_is_the_stated_one(start: int, size: int) -> None:
    """Runs cross the edges of 32 bits and are longer than a SIMD register, with a remainder."""
    count = 77
    out, expected = torch.zeros(1, size), torch.zeros(1, size)
    values = integers(1, count, seed=1)
    for n in range(count):
        bucket, sign = reference(size, 5, KEY, start + n)
        expected[0, bucket] += sign * values[0, n]
    CountSketch(size, 5).add_(out, values, torch.tensor(range(start, start + count)), KEY)
    assert torch.equal(out, expected)


def test_bad_values_stay_bad() -> None:
    """NaN and infinity reach the gram; they are not lost with the sign."""
    for bad in (torch.nan, torch.inf):
        x = integers(2, 100, seed=1)
        x[1, 50] = bad
        finite = sketch(CountSketch(16, 1), x).isfinite().all(1)
        assert finite.tolist() == [True, False]


def test_split_of_the_gram() -> None:
    J, t = integers(2, 4, 9, seed=1), integers(2, 1, 9, seed=2)
    gram, cross, target_sq = split(gram_of(torch.cat([J, t], 1)))
    assert gram.dtype == torch.float64
    assert torch.equal(gram, (J @ J.mT).double())
    assert torch.equal(cross, (J @ t.mT)[..., 0].double())
    assert torch.equal(target_sq, (t**2).sum((1, 2)).double())


@pytest.mark.parametrize("size", [0, -2, 3, 1000, 2**32])
def test_bad_size(size: int) -> None:
    with pytest.raises(ValueError, match="size is"):
        CountSketch(size, 0)


def test_key_is_stable() -> None:
    assert key_of("a") == 2340832890917691671
    assert 0 <= KEY < 2**63 and KEY != OTHER
