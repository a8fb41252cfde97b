"""The projection's functions on a device against the same on the CPU.

Shape suffixes: M rows, N elements, K sketch size, B blocks, R = M + 1 (rows plus target).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_dr.config.dr import DRConfig
from megatron_dr.config.kinds import FEASIBLE_SETS
from megatron_dr.mcore.gpu_check.found import NO_CUDA, Found, Where, within
from megatron_dr.mcore.gpu_check.start import device
from megatron_dr.projection import (
    CountSketch,
    Kronecker,
    gram_of,
    gram_of_long,
    key_of,
    kkt_residual,
    per_sample,
    project,
    solve_qp,
)

_ROWS = (2, 8, 32)
_RESIDUAL = 1e-6  # what the solvers promise
_WEIGHTS = 1e-5  # of weights, by a residual as large and the ridges here
_SHORT = 100_001  # elements: in rows of many more, what TF32 rounds off averages out
_FP32 = 1e-5  # of sums in fp32


def maths(where: Where) -> Iterator[Found]:
    """Solvers, sets, grams, sketches, and samples' products."""
    if not where.cuda:
        yield Found("solvers, sets, grams, sketches", NO_CUDA)
        return
    torch.cuda.set_device(where.device)
    assert where.device == device()
    yield from compare(where.device, where.small)


def compare(on: torch.device, small: bool) -> Iterator[Found]:
    """Each function on a device, against the CPU."""
    blocks, elements = (3, 5_000) if small else (64, 3_000_001)
    for rows in _ROWS:
        gram_BRR = grams(blocks, rows)
        yield from solvers(gram_BRR, on)
        yield from sets(gram_BRR, on)
    yield from long_grams(elements, on)
    yield from sketches(elements, on)
    yield from samples(on, small)


def grams(blocks: int, rows: int) -> Tensor:
    """Grams [B, R, R] of rows that lean towards their target; one of twins, one of zeros."""
    generator = torch.Generator().manual_seed(rows)
    x_BRN = torch.randn(blocks, rows + 1, 64, generator=generator, dtype=torch.float64)
    x_BRN[:, :-1] += 0.3 * x_BRN[:, -1:]
    x_BRN[0, 1] = x_BRN[0, 0]
    x_BRN[-1, 0] = 0.0
    return gram_of(x_BRN * torch.logspace(-6, 6, blocks)[:, None, None])


def solvers(gram_BRR: Tensor, on: torch.device) -> Iterator[Found]:
    """The weights, and the residual on the device."""
    rows = gram_BRR.shape[1] - 1
    H, c = gram_BRR[:, :-1, :-1].contiguous(), gram_BRR[:, :-1, -1].contiguous()
    H = H + 0.1 * H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(rows).double()
    kinds = {"cone": (None, None), "hull": (None, 1.0), "capped": (2.0 / rows, 1.0)}
    for kind, (upper, total) in kinds.items():
        wanted = solve_qp(H, c, upper=upper, sum_to=total)
        found = solve_qp(H.to(on), c.to(on), upper=upper, sum_to=total)
        name = f"solver: {kind}, {rows} rows"
        yield within(name, apart(found, wanted), _WEIGHTS)
        residual = kkt_residual(H.to(on), c.to(on), found, upper, total).max()
        yield within(f"{name}, KKT residual", float(residual), _RESIDUAL)


def sets(gram_BRR: Tensor, on: torch.device) -> Iterator[Found]:
    """Weights and update of every feasible set."""
    rows = gram_BRR.shape[1] - 1
    for name in FEASIBLE_SETS:
        chosen = DRConfig(set=name, fraction=0.5).feasible_set()
        wanted = project(gram_BRR, chosen, "general", 0.1)
        found = project(gram_BRR.to(on), chosen, "general", 0.1)
        error = max(
            apart(found.weights_BM, wanted.weights_BM), apart(found.update_BR, wanted.update_BR)
        )
        yield within(f"set: {name}, {rows} rows", error, _WEIGHTS)


def long_grams(elements: int, on: torch.device) -> Iterator[Found]:
    """Exact grams of fp32 rows, also where TF32 was allowed."""
    x_RN = torch.randn(5, min(elements, _SHORT), generator=torch.Generator().manual_seed(1))
    wanted = gram_of(x_RN[None])[0]
    length_R = wanted.diagonal().sqrt()
    before = torch.backends.cuda.matmul.allow_tf32
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        try:
            found = gram_of_long([x_RN.to(on)]).cpu()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        error = float(((found - wanted) / length_R / length_R[:, None]).abs().max())
        yield within(f"gram of long rows{', TF32 allowed' if allowed else ''}", error, 1e-7)


def sketches(elements: int, on: torch.device) -> Iterator[Found]:
    """The same hashes: sums of whole numbers have no rounding, so their sketches are the same."""
    generator = torch.Generator().manual_seed(2)
    x_RN = torch.randint(-8, 9, (3, elements), generator=generator).float()
    index_N = torch.arange(elements) * 2_000_003  # beyond 32 bits
    out = {}
    for device_ in (torch.device("cpu"), on):
        out[device_] = torch.zeros(3, 4096, device=device_)
        sketch = CountSketch(4096, 7)
        sketch.add_(out[device_], x_RN.to(device_), index_N.to(device_), key_of("a.weight"))
    yield within("sketch: CountSketch", apart(out[on], out[torch.device("cpu")]), 0.0)
    kronecker = Kronecker("a.weight", 1000, 300, 64, 64, 7)
    for side in ("out", "in"):
        wanted = kronecker.columns(side, None, "cpu", torch.float32)
        found = kronecker.columns(side, None, on, torch.float32)
        assert wanted is not None and found is not None
        yield within(f"sketch: Kronecker, {side}", apart(found, wanted), 0.0)


def samples(on: torch.device, small: bool) -> Iterator[Found]:
    """Products of samples' gradients from bf16 factors, against the formed gradients in float64."""
    length, number, inner, out = (16, 3, 24, 32) if small else (512, 4, 768, 512)
    generator = torch.Generator().manual_seed(3)
    x_LNI = torch.randn(length, number, inner, generator=generator).bfloat16()
    dy_LNO = torch.randn(length, number, out, generator=generator).bfloat16()
    g_NOI = torch.einsum("lno,lni->noi", dy_LNO.double(), x_LNI.double())
    t_OI = torch.randn(out, inner, generator=generator)
    t = t_OI.flatten().double()
    kronecker = Kronecker("a.weight", out, inner, 16, 16, 7)
    p_out, p_in = (kronecker.columns(side, None, "cpu", torch.float32) for side in ("out", "in"))
    assert p_out is not None and p_in is not None
    pair = [(x_LNI.to(on), dy_LNO.to(on))]
    flat = g_NOI.flatten(1)
    sketched = torch.einsum("ko,noi,li->nkl", p_out.double(), g_NOI, p_in.double()).flatten(1)
    checks = {
        "formed": (per_sample.gradients(*pair[0], out), g_NOI),
        "ghost": (per_sample.ghost_gram(pair), flat @ flat.T),
        "ghost, target": (per_sample.ghost_cross(pair, t_OI.to(on)), flat @ t),
        "sketched": (per_sample.sketch(pair, p_out.to(on), p_in.to(on)), sketched),
    }  # fmt: skip
    for name, (found, wanted) in checks.items():
        # a bf16 partner of a split fp32 factor keeps 2^-17 of it
        yield within(f"samples: {name}", apart(found, wanted), 10 * _FP32)


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest that is wanted; NaN where they differ in
    being NaN."""
    found, wanted = found.cpu().double(), wanted.double()
    if not torch.equal(found.isnan(), wanted.isnan()):
        return float("nan")
    largest = float(wanted.nan_to_num(0.0).abs().max())
    return float((found - wanted).nan_to_num(0.0).abs().max()) / (largest or 1.0)
