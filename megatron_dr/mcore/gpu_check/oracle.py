"""What a step should give, from dense rows in float64 on the CPU. Obviously correct, but slow.

The cone's weights come from trying every set of rows that may have some; of the plugin only the
maps of its sketches are used. A gradient is a dictionary, by parameter.

Shape suffixes: M rows, N elements.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_dr.config.dr import DRConfig
from megatron_dr.projection import CountSketch, Kronecker, block_of, key_of

Gradient = dict[str, Tensor]
Seen = Callable[[Gradient], Tensor]  # of a block's gradient, the vector that is multiplied
_NEAR = 0.05  # of the largest score: two as near may change places by rounding


def exact(block: Gradient) -> Tensor:
    """Whole gradients."""
    return torch.cat([gradient.reshape(-1) for gradient in block.values()])


def hashed(dr: DRConfig, step: int) -> Seen:
    """What a sketched gram of buffers sees."""
    assert dr.sketch_size is not None
    sketch = CountSketch(dr.sketch_size, dr.seed * 1_000_003 + step)

    def seen(block: Gradient) -> Tensor:
        out = torch.zeros(1, sketch.size, dtype=torch.float64)
        for name, gradient in block.items():
            index = torch.arange(gradient.numel())
            sketch.add_(out, gradient.reshape(1, -1), index, key_of(name))
        return out[0]

    return seen


def by_sides(dr: DRConfig) -> Seen:
    """What sketched samples see: of a matrix its two sides' sketch."""
    assert dr.kronecker_out is not None and dr.kronecker_in is not None
    size_out, size_in = dr.kronecker_out, dr.kronecker_in

    def seen(block: Gradient) -> Tensor:
        out = {}
        for name, gradient in block.items():
            if gradient.dim() == 2:
                out_side, in_side = gradient.shape
                sketch = Kronecker(name, out_side, in_side, size_out, size_in, dr.seed)
                p_out = sketch.columns("out", None, "cpu", torch.float64)
                p_in = sketch.columns("in", None, "cpu", torch.float64)
                gradient = gradient if p_out is None else p_out @ gradient
                gradient = gradient if p_in is None else gradient @ p_in.T
            out[name] = gradient
        return exact(out)

    return seen


def update(
    dr: DRConfig, rows: Sequence[Gradient], target: Gradient, seen: Seen, share_M: Tensor
) -> tuple[Gradient, set[str]]:
    """What the optimizer should get, by parameter; and those whose choice of rows is so near that
    rounding may change it.

    Args:
        rows: whose mean is the general gradient.
        share_M: of the rows' tokens.
    """
    names: dict[str, list[str]] = {}
    for name in target:
        names.setdefault(block_of(name, dr.blocks), []).append(name)
    out, near = {}, set()
    for members in names.values():
        vectors = torch.stack([seen({n: g[n] for n in members}) for g in (*rows, target)])
        gram_RR = vectors @ vectors.T
        weights_M, close = weights(dr, gram_RR[:-1, :-1], gram_RR[:-1, -1])
        scale = _scale(dr.norm, gram_RR[:-1, :-1], weights_M, share_M)
        near |= set(members) if close else set()
        for name in members:
            d = torch.stack([g[name] for g in rows], -1) @ weights_M
            out[name] = (1.0 - dr.alpha) * scale * d + dr.alpha * target[name]
    return out, near


def weights(dr: DRConfig, gram_MM: Tensor, cross_M: Tensor) -> tuple[Tensor, bool]:
    """w [M] of the cone or of topk, and whether the choice is near.

    Raises:
        ValueError: another set.
    """
    rows = len(cross_M)
    if dr.set == "topk":
        kept = max(1, int(dr.fraction * rows))
        score_M, order_M = cross_M.sort(descending=True)
        weights_M = torch.zeros(rows, dtype=torch.float64)
        weights_M[order_M[:kept]] = 1.0 / kept
        gap = score_M[kept - 1] - score_M[kept] if kept < rows else score_M.abs().max()
        return weights_M, bool(gap <= _NEAR * score_M.abs().max())
    if dr.set != "cone":
        raise ValueError(f"the oracle knows the sets cone and topk, not {dr.set!r}.")
    ridge = dr.ridge * gram_MM.trace() / rows
    return nonnegative(gram_MM + ridge * torch.eye(rows).double(), cross_M + ridge / rows), False


def nonnegative(hessian_MM: Tensor, linear_M: Tensor) -> Tensor:
    """argmin of 1/2 w'Hw - l'w over w >= 0, H positive definite: the best of all supports."""
    rows, best = len(linear_M), (0.0, torch.zeros_like(linear_M))
    for size in range(1, rows + 1):
        for support in map(list, itertools.combinations(range(rows), size)):
            part = torch.linalg.solve(hessian_MM[support][:, support], linear_M[support])
            value = -0.5 * float(part @ linear_M[support])
            if bool((part >= 0).all()) and value < best[0]:
                best = value, torch.zeros_like(linear_M).index_copy(0, torch.tensor(support), part)
    return best[1]


def _scale(norm: str, gram_MM: Tensor, weights_M: Tensor, share_M: Tensor) -> float:
    if norm == "tokens":
        return float(1.0 / (len(weights_M) * (weights_M @ share_M)))
    length = float(weights_M @ gram_MM @ weights_M)
    return float(gram_MM.mean() / length) ** 0.5 if length > 0 else 1.0


def difference(found: Gradient, expected: Gradient, leave: set[str]) -> tuple[float, str]:
    """The largest |found - expected| / |expected| of a parameter, and which."""
    worst = (0.0, "")
    for name in expected.keys() - leave:
        error = float((found[name] - expected[name]).norm() / expected[name].norm())
        if not error <= worst[0]:  # NaN is the worst
            worst = (error, name)
    return worst
