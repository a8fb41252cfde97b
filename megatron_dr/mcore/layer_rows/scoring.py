"""Inner products of samples' gradients, from what their layer's backward has at hand.

A *use* of a weight is (x [L, N, I], dy [L, N, O]) or, of an embedding, (x, index [L, N]); of a
vector parameter it is (g [N, H], None). Several uses of one weight add up before any product.

Shapes: N samples of a microbatch, R = M + 1 rows and target, map [R, N] which samples make which
rows (the target's row is 0 where the target has a pass of its own).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_dr.mcore import collectives, meter
from megatron_dr.mcore.layer_rows.estimate import Estimate
from megatron_dr.mcore.layer_rows.places import Place
from megatron_dr.projection import per_sample

Use = tuple[torch.Tensor, Any]


def features(place: Place, uses: list[Use]) -> torch.Tensor:
    """[N, K] in fp32: each sample's gradient of this rank's piece, or its sketch; partial sums
    over `place.sums`."""
    if place.is_vector:
        total = _total([g for g, _ in uses]).float()
        return total.clone()  # `summed` works in place, and the use still gives the update
    if place.score == "sketched":
        return per_sample.sketch(uses, place.p_out, place.p_in)
    out = place.owned.parameter.shape[0]
    return _total([per_sample.gradients(x, dy, out) for x, dy in uses]).flatten(1)


def _total(parts: list[torch.Tensor]) -> torch.Tensor:
    """Their sum; of a single one, as of most weights, itself and no copy."""
    return functools.reduce(torch.add, parts)


def summed(place: Place, feature_NK: torch.Tensor) -> torch.Tensor:
    """Features over the ranks that hold parts of them (collective)."""
    feature_NK = feature_NK.contiguous()
    with meter.part("exchange"):
        for group in place.sums:
            collectives.all_reduce(feature_NK, group)
    if place.owned.partial == "tensor" and place.owned.count != 1.0:
        feature_NK *= place.owned.count  # Megatron averages this one over tensor-parallel ranks
    return feature_NK


def gram(
    place: Place, uses: list[Use], map_RN: torch.Tensor, target: torch.Tensor | None,
    rows_too: bool, estimate: Estimate,
) -> torch.Tensor:  # fmt: skip
    """gram [R, R] in fp32, of rows and target; sums over `place.gram_group` are left to the caller.

    Args:
        map_RN: which samples make which rows.
        target: the target's own features [K], or gradient [O, I] for `ghost`; None where its
            samples are in the microbatch. Already times its ratio to the rows.
        rows_too: whether products of rows with rows are needed; else they are 0, but for the
            target's square.
        estimate: of the step, which sees sketches.
    """
    if place.score == "ghost" and not place.is_vector:
        return _ghost(place, uses, map_RN, target, rows_too)
    feature_NK = summed(place, features(place, uses))
    return dense_gram(feature_NK, map_RN, target, rows_too, functools.partial(estimate.see, place))


def dense_gram(
    feature_NK: torch.Tensor, map_RN: torch.Tensor, target_K: torch.Tensor | None,
    rows_too: bool, see: Callable[[torch.Tensor, torch.Tensor], None],
) -> torch.Tensor:  # fmt: skip
    """gram [R, R] of map features, the target's row being `target_K` where it has its own pass.

    Features may be whole gradients: no row is formed, only products of them are mapped.

    Args:
        see: is shown the samples' features, and the target's.
    """
    map_RN, general = map_RN.float(), len(map_RN) - 1
    if target_K is None:
        see(feature_NK[:general], feature_NK[general:].sum(0))
    else:
        see(feature_NK, target_K.flatten())
    gram_RR = map_RN.new_zeros(len(map_RN), len(map_RN))
    if rows_too:
        gram_RR = _made(map_RN, _made(map_RN, feature_NK @ feature_NK.t()).t())
        if target_K is None:
            return gram_RR
    if target_K is None:  # its samples come last, all with the same factor
        target_K = map_RN[-1, -1] * feature_NK[general:].sum(0)
    cross_R = _made(map_RN, feature_NK @ target_K.flatten())
    gram_RR[-1], gram_RR[:, -1] = cross_R, cross_R
    gram_RR[-1, -1] = target_K.square().sum()
    return gram_RR


def _made(map_RN: torch.Tensor, of_N: torch.Tensor) -> torch.Tensor:
    """map x, x [N, ...]: each sample makes one row, and what is left over the last one. A product
    of matrices would spread what is not finite over all rows, as 0 times NaN is NaN."""
    rows = len(map_RN) - 1
    scale_N = map_RN.sum(0).view(-1, *(1 for _ in of_N.shape[1:]))
    scaled_N = scale_N * of_N
    return torch.cat([scaled_N[:rows], scaled_N[rows:].sum(0, keepdim=True)])


def _ghost(
    place: Place, uses: list[Use], map_RN: torch.Tensor, target_OI: torch.Tensor | None,
    rows_too: bool,
) -> torch.Tensor:  # fmt: skip
    uses = [_whole_sequence(place, use) for use in uses]
    map_RN = map_RN.float()
    gram_RR = map_RN.new_zeros(map_RN.shape[0], map_RN.shape[0])
    if rows_too:
        gram_RR = _made(map_RN, _made(map_RN, per_sample.ghost_gram(uses)).t())
        if target_OI is None:
            return gram_RR
    if target_OI is None:
        cross_R = _made(map_RN, map_RN[-1, -1] * _ghost_merged(place, uses, len(map_RN) - 1))
        gram_RR[-1], gram_RR[:, -1] = cross_R, cross_R
        return gram_RR
    cross_R = _made(map_RN, per_sample.ghost_cross(uses, target_OI))
    gram_RR[-1], gram_RR[:, -1] = cross_R, cross_R
    gram_RR[-1, -1] = target_OI.square().sum()
    return gram_RR


def _ghost_merged(place: Place, uses: list[Use], general: int) -> torch.Tensor:
    """<G_n, sum of the target samples' G> [N], the target's samples being those from `general` on;
    token by token, or by their gradient where that takes fewer FLOPs."""
    targets = [(x[:, general:], dy[:, general:]) for x, dy in uses]
    out, inner = place.owned.parameter.shape
    tokens = sum(x.shape[0] * x.shape[1] for x, _ in targets)
    if tokens * (out + inner) < out * inner and all(dy.is_floating_point() for _, dy in uses):
        return per_sample.ghost_between(uses, targets)
    return per_sample.ghost_cross(uses, _total([_gradient(place, x, dy) for x, dy in targets]))


def _whole_sequence(place: Place, use: Use) -> Use:
    """Tokens of all ranks that have some of a sample's: products of tokens need both."""
    x, dy = use
    for group in place.tokens:
        if place.owned.is_expert:  # ranks have unequal numbers of tokens
            length = torch.tensor([len(x)], device=x.device)
            collectives.all_reduce(length, group, dist.ReduceOp.MAX)
            missing = (0, 0, 0, 0, 0, int(length) - len(x))
            x, dy = (torch.nn.functional.pad(part, missing) for part in (x, dy))
        with meter.part("exchange"):
            x, dy = collectives.gathered(x, group), collectives.gathered(dy, group)
    return x, dy


def target_part(place: Place, uses: list[Use]) -> torch.Tensor:
    """What is kept of the target's own microbatch: the sum of its samples' features [K], or its
    gradient [O, I] for `ghost`; partial over `place.sums` and over all data ranks."""
    if place.is_vector or place.score == "sketched":
        return features(place, uses).sum(0)
    return _total([_gradient(place, x, dy) for x, dy in uses])


def _gradient(place: Place, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """dy^T x [O, I] in fp32."""
    out = place.owned.parameter.shape[0]
    return gradient(x.flatten(0, 1), dy.flatten(0, 1), out).float()


def gradient(x_TI: torch.Tensor, dy: torch.Tensor, out: int) -> torch.Tensor:
    """dy^T x [O, I]; dy may be row numbers [T], -1 for none."""
    if dy.is_floating_point():
        return dy.t().matmul(x_TI)
    kept = dy >= 0
    zeros = x_TI.new_zeros(out, x_TI.shape[1])
    return zeros.index_add_(0, dy.clamp(min=0), x_TI * kept[:, None])
