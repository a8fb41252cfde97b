"""Products of samples' gradients equal those of autograd's, a sample at a time, in float64."""

import math

import pytest
import torch
from _pairs import KINDS, SHAPES, by_autograd, dense, one_hot, pairs
from _samplers import generator, normal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dr.projection import (
    Ball,
    Capped,
    Cone,
    FeasibleSet,
    Filter,
    Greedy,
    Halfspace,
    Hull,
    Mean,
    Span,
    Target,
    TopK,
    per_sample,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # all of whose products fp32 holds
OF_EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
OF_EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES)
OF_EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


def assert_near(got: Tensor, expected: Tensor, size: Tensor | float) -> None:
    """fp32, and within 1e-6 of `size`, what the summed numbers were like."""
    assert got.dtype == torch.float32 and got.shape == expected.shape
    assert ((got.double() - expected).abs() <= 1e-6 * size).all()


def sizes(g_NOI: Tensor) -> Tensor:
    """|G_n|, and a little for gradients that cancel."""
    return g_NOI.flatten(1).norm(dim=1) + 1.0


@OF_EVERY_KIND
@OF_EVERY_SHAPE
@OF_EVERY_DTYPE
def test_gradients(kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    for pair in pairs(kind, shape, dtype):
        expected = by_autograd([pair], shape[3])
        assert_near(per_sample.gradients(*pair, shape[3]), expected, sizes(expected)[:, None, None])


@OF_EVERY_KIND
@OF_EVERY_SHAPE
@OF_EVERY_DTYPE
def test_ghost_gram(kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    uses = pairs(kind, shape, dtype)
    g_NK = by_autograd(uses, shape[3]).flatten(1)
    size_NN = 3 * sizes(g_NK)[:, None] * sizes(g_NK)
    for some in (uses, uses[::-1]):
        gram_NN = per_sample.ghost_gram(some)
        assert_near(gram_NN, g_NK @ g_NK.t(), size_NN)
        assert torch.equal(gram_NN, gram_NN.t())


@OF_EVERY_KIND
@OF_EVERY_SHAPE
@OF_EVERY_DTYPE
def test_ghost_cross(kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    uses = pairs(kind, shape, dtype)
    target_OI = normal(shape[3], shape[2], seed=3).float()
    g_NOI = by_autograd(uses, shape[3])
    expected = (g_NOI * target_OI.double()).sum((1, 2))
    size_N = 3 * sizes(g_NOI) * (1 + target_OI.double().norm())
    assert_near(per_sample.ghost_cross(uses, target_OI), expected, size_N)


@OF_EVERY_KIND
@OF_EVERY_SHAPE
@OF_EVERY_DTYPE
@pytest.mark.parametrize("sides", ["both", "out", "in", "none"])
def test_sketch(
    kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype, sides: str
) -> None:
    uses = pairs(kind, shape, dtype)
    p_out = normal(4, shape[3], seed=4).float() if sides in ("both", "out") else None
    p_in = normal(3, shape[2], seed=5).float() if sides in ("both", "in") else None
    if p_out is None and kind in ("index", "tied"):
        with pytest.raises(ValueError, match="row numbers"):
            per_sample.sketch(uses, p_out, p_in)
        p_out = torch.eye(shape[3])
    expected = by_autograd(uses, shape[3])
    size_N11 = sizes(expected)[:, None] * 3
    for p, side in ((p_out, 0), (p_in, 1)):
        if p is not None:
            left = expected if side == 0 else expected.mT
            product = p.double() @ left
            expected = product if side == 0 else product.mT
            size_N11 = size_N11 * (1 + p.double().norm())
    assert_near(per_sample.sketch(uses, p_out, p_in), expected.flatten(1), size_N11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_do_not_lose_small_terms(dtype: torch.dtype) -> None:
    """4096 ones: a sum in half precision stops at 256 or 2048."""
    x_LNI = torch.ones(4096, 2, 1, dtype=dtype)
    g_NOI = per_sample.gradients(x_LNI, x_LNI, 1)
    one = torch.ones(1, 1)
    assert (g_NOI == 4096).all()
    assert (per_sample.ghost_gram([(x_LNI, x_LNI)]) == 4096**2).all()
    assert (per_sample.ghost_cross([(x_LNI, x_LNI)], one) == 4096).all()
    assert (per_sample.sketch([(x_LNI, x_LNI)], one, one) == 4096).all()


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made beside those given."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.bytes, self.given = 0, {t.untyped_storage().data_ptr() for t in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            if storage.data_ptr() not in self.given:  # a view
                self.bytes = max(self.bytes, storage.nbytes())
        return result


@OF_EVERY_KIND
def test_memory_is_bounded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks, with remainders: as at once, with no product above the bound."""
    uses = pairs(kind, (37, 3, 16, 48), torch.float32)
    target_OI = normal(48, 16, seed=3).float()
    gram_NN, cross_N = per_sample.ghost_gram(uses), per_sample.ghost_cross(uses, target_OI)
    block = per_sample.block_rows()
    assert 2 * 4 * block**2 <= per_sample.BLOCK < 2 * 4 * (block + 1) ** 2
    monkeypatch.setattr(per_sample, "BLOCK", 3200)  # 20 tokens: 6 of each sample
    with Largest([target_OI, *(t for pair in uses for t in pair)]) as seen:
        in_blocks_NN = per_sample.ghost_gram(uses)
        in_blocks_N = per_sample.ghost_cross(uses, target_OI)
    assert 0 < seen.bytes <= 3200
    assert torch.allclose(in_blocks_NN, gram_NN, rtol=1e-5, atol=1e-6 * gram_NN.max().item())
    assert torch.allclose(in_blocks_N, cross_N, rtol=1e-5, atol=1e-6 * gram_NN.max().item())


def test_bad_values_stay_bad() -> None:
    uses = [dense(4, 3, 5, 6, torch.float32)]
    uses[0][0][1, 1, 2] = torch.nan
    bad = torch.tensor([False, True, False])
    assert torch.equal(per_sample.ghost_gram(uses).isnan(), bad[:, None] | bad)
    assert torch.equal(per_sample.ghost_cross(uses, torch.ones(6, 5)).isnan(), bad)
    assert torch.equal(per_sample.sketch(uses, None, torch.ones(2, 5)).isnan().any(1), bad)


def test_never_looks_at_a_value() -> None:
    """Tensors without values: whatever would make the host wait for a device fails on them."""
    uses = [
        tuple(t.to("meta") for t in pair) for pair in pairs("tied", (5, 4, 6, 3), torch.float32)
    ]
    target_OI, coefficient_N = torch.empty(3, 6, device="meta"), torch.empty(4, device="meta")
    keep_N = torch.empty(2, device="meta", dtype=torch.int64)
    assert per_sample.ghost_gram(uses).shape == (4, 4)
    assert per_sample.ghost_cross(uses, target_OI).shape == (4,)
    assert per_sample.sketch(uses, target_OI[:, :3], target_OI[:2]).shape == (4, 6)
    assert per_sample.gradients(*uses[1], 3).shape == (4, 3, 6)
    assert per_sample.Weighted(*uses[0], coefficient_N, keep_N)[0].shape == (10, 6)


@OF_EVERY_DTYPE
@pytest.mark.parametrize("keep", [None, [2, 0], [3], []])
def test_weighted(dtype: torch.dtype, keep: list[int] | None) -> None:
    """Its product is sum over n of a_n G_n; what dy loses is one rounding."""
    x_LNI, dy_LNO = dense(5, 4, 6, 3, dtype)
    coefficient_N = normal(4, seed=1)
    keep_N = None if keep is None else torch.tensor(keep, dtype=torch.int64)
    x_TI, dy_TO = per_sample.Weighted(x_LNI, dy_LNO, coefficient_N, keep_N)
    kept = range(4) if keep is None else keep
    a_N = torch.tensor([coefficient_N[n].item() if n in kept else 0.0 for n in range(4)])
    assert x_TI.shape == (5 * len(kept), 6) and dy_TO.shape == (5 * len(kept), 3)
    assert x_TI.dtype == dy_TO.dtype == dtype
    exactly = (dy_LNO.double() * coefficient_N[:, None]).float()[:, list(kept)].flatten(0, 1)
    assert torch.allclose(dy_TO.float(), exactly, rtol=0.51 * torch.finfo(dtype).eps + 2e-7)
    expected = (a_N[:, None, None] * by_autograd([(x_LNI, dy_LNO)], 3)).sum(0)
    eps = 4 * torch.finfo(dtype).eps
    assert torch.allclose(dy_TO.double().t() @ x_TI.double(), expected, atol=20 * eps)


def test_weighted_without_weights_copies_nothing() -> None:
    x_LNI, dy_LNO = dense(5, 4, 6, 3, torch.bfloat16)
    x_TI, dy_TO = per_sample.Weighted(x_LNI, dy_LNO, None, None)
    assert x_TI.data_ptr() == x_LNI.data_ptr() and dy_TO.data_ptr() == dy_LNO.data_ptr()
    some_TI, some_TO = per_sample.Weighted(x_LNI, dy_LNO, None, torch.tensor([3, 1]))
    assert torch.equal(some_TI, x_LNI[:, [3, 1]].flatten(0, 1))
    assert torch.equal(some_TO, dy_LNO[:, [3, 1]].flatten(0, 1))


@pytest.mark.parametrize("seed", range(20))
def test_by_sample(seed: int) -> None:
    """Tokens of a sample in the order in which they come, then padding; some are of no sample."""
    tokens, num = 1 + 3 * seed, 1 + seed % 5
    sample_T = torch.randint(-1 if seed % 2 else 0, num, (tokens,), generator=generator(seed))
    x_TI, index_T = normal(tokens, 2, 3, seed=seed), torch.arange(tokens)
    x_LNI = per_sample.by_sample(x_TI, sample_T, num)
    index_LN = per_sample.by_sample(index_T, sample_T, num, pad=-1)
    length = max(int((sample_T == n).sum()) for n in range(num))
    assert x_LNI.shape == (length, num, 2, 3) and index_LN.shape == (length, num)
    for n in range(num):
        own_T = sample_T == n
        count = int(own_T.sum())
        assert torch.equal(x_LNI[:count, n], x_TI[own_T]) and (x_LNI[count:, n] == 0).all()
        assert torch.equal(index_LN[:count, n], index_T[own_T]) and (index_LN[count:, n] < 0).all()


def test_by_sample_of_no_token() -> None:
    """An expert that no token was routed to: gradients of zeros."""
    none_T = torch.full((4,), -1)
    x_LNI = per_sample.by_sample(torch.ones(4, 3), none_T, 2)
    dy_LNO = per_sample.by_sample(torch.ones(4, 5), none_T, 2)
    assert x_LNI.shape == (0, 2, 3)
    assert torch.equal(per_sample.gradients(x_LNI, dy_LNO, 5), torch.zeros(2, 5, 3))
    assert torch.equal(per_sample.ghost_gram([(x_LNI, dy_LNO)]), torch.zeros(2, 2))
    c_NK = per_sample.sketch([(x_LNI, dy_LNO)], None, torch.ones(2, 3))
    assert torch.equal(c_NK, torch.zeros(2, 10))
    assert torch.equal(per_sample.ghost_cross([(x_LNI, dy_LNO)], torch.ones(5, 3)), torch.zeros(2))


def test_by_sample_refuses_an_unknown_sample() -> None:
    with pytest.raises(ValueError, match="not below 2"):
        per_sample.by_sample(torch.ones(3), torch.tensor([0, 2, 1]), 2)


def test_packed_samples() -> None:
    """Tokens of several samples in one sequence, out of order: as if each were by itself."""
    x_LNI, dy_LNO = dense(6, 4, 3, 5, torch.float32)
    index_LN = one_hot(6, 4, 3, 5, torch.float32)[1]
    order_T = torch.randperm(24, generator=generator(1))
    sample_T = torch.arange(4).repeat(6)[order_T]
    # a sample's tokens are shuffled too: its gradient does not depend on their order
    packed = [per_sample.by_sample(t.flatten(0, 1)[order_T], sample_T, 4) for t in (x_LNI, dy_LNO)]
    index = per_sample.by_sample(index_LN.flatten()[order_T], sample_T, 4, pad=-1)
    g_NK = by_autograd([(x_LNI, dy_LNO), (x_LNI, index_LN)], 5).flatten(1)
    gram_NN = per_sample.ghost_gram([(packed[0], packed[1]), (packed[0], index)])
    assert torch.allclose(gram_NN.double(), g_NK @ g_NK.t(), atol=1e-4)


def test_split_holds_a_number_to_17_bits() -> None:
    x = normal(10000, seed=1).float() * torch.logspace(-20, 20, 10000)
    high, low = per_sample._split(x)
    assert high.dtype == low.dtype == torch.bfloat16
    assert ((high.double() + low.double() - x.double()).abs() <= 2**-17 * x.abs().double()).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@OF_EVERY_KIND
@OF_EVERY_DTYPE
def test_on_a_gpu(kind: str, dtype: torch.dtype) -> None:
    shape = (40, 4, 64, 48)
    uses = [(x.cuda(), dy.cuda()) for x, dy in pairs(kind, shape, dtype)]
    g_NOI = by_autograd([(x.cpu(), dy.cpu()) for x, dy in uses], 48)
    target_OI, g_NK = normal(48, 64, seed=3).float(), g_NOI.flatten(1)
    p_out, p_in = normal(8, 48, seed=4).float(), normal(8, 64, seed=5).float()
    expected = [g_NK @ g_NK.t(), g_NK @ target_OI.double().flatten()]
    expected.append((p_out.double() @ g_NOI @ p_in.double().t()).flatten(1))
    got = [per_sample.ghost_gram(uses), per_sample.ghost_cross(uses, target_OI.cuda())]
    got.append(per_sample.sketch(uses, p_out.cuda(), p_in.cuda()))
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine.cpu().double() - theirs).norm() <= 1e-5 * math.sqrt(10) * theirs.norm()


ALL_SETS = [
    *(TopK(0.5), Greedy(0.5), Filter(0.5), Capped(0.5), Hull(), Cone(), Span(), Mean(), Target()),
    *(Ball(0.5), Halfspace()),
]


@pytest.mark.parametrize("feasible_set", ALL_SETS, ids=lambda s: type(s).__name__)
def test_rows_that_are_all_zero(feasible_set: FeasibleSet) -> None:
    """As LoRA's A at step 0: weights are finite, and equal or, of k kept rows, the first k's."""
    x_LNI, dy_LNO = dense(5, 6, 4, 3, torch.float32)
    gram_NN = per_sample.ghost_gram([(x_LNI, torch.zeros_like(dy_LNO))])[None]
    w_N = feasible_set.weights(gram_NN, gram_NN[:, :, -1])[0]
    first, zero = w_N[0], torch.zeros(())
    kept = 3 if isinstance(feasible_set, TopK | Greedy) else 6
    assert w_N.isfinite().all()
    assert (w_N[:kept] == first).all() and (w_N[kept:] == zero).all()
