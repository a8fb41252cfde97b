"""Losses on completions against the equations in loops, and what must not change them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_dr.rl import losses
from megatron_dr.rl.weights import Aggregation, TokenWeights, token_weights
from tests.rl import _dense

LENGTHS = [5, 1, 0, 3, 7, 2]
WIDTH = 9
CLIP = 0.2
KINDS = ["policy", "kl", "value", "reward"]
AGGREGATIONS = ["token", "sequence"]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs() -> Inputs:
    """(new, old, other, signal) [B, T]: moves of up to 0.5, so that clips bind here and there."""
    generator = torch.Generator().manual_seed(3)
    shape = (len(LENGTHS), WIDTH)
    new, move, other, signal = torch.randn(4, *shape, dtype=torch.float64, generator=generator)
    signal = signal[:, :1].expand(shape).clone()
    return new, new + 0.4 * move, new + 0.5 * other, signal


def mask(lengths: list[int] = LENGTHS, width: int = WIDTH) -> Tensor:
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]


def loss(kind: str, tensors: Inputs, weights: TokenWeights) -> tuple[Tensor, Tensor]:
    new, old, other, signal = tensors
    if kind == "policy":
        return losses.policy_loss(new, old, signal, weights, CLIP)
    if kind == "kl":
        return losses.kl_loss(new, other, weights)
    if kind == "value":
        return losses.value_loss(new, old, other, weights, CLIP)
    return losses.gradient_loss(new, signal, weights)


def dense(kind: str, tensors: Inputs, aggregation: str) -> Tensor:
    new, old, other, signal = tensors

    def token(b: int, t: int) -> Tensor:
        n, o, r, a = new[b, t], old[b, t], other[b, t], signal[b, t]
        return {
            "policy": lambda: _dense.policy(n, o, a, CLIP),
            "kl": lambda: _dense.k3(n, r),
            "value": lambda: _dense.value(n, o, r, CLIP),
            "reward": lambda: -a * n,
        }[kind]()

    return _dense.mean_over(LENGTHS, aggregation, token)


def with_grad(tensors: Inputs, compute: Callable[[Inputs], Tensor]) -> tuple[Tensor, Tensor]:
    new = tensors[0].clone().requires_grad_()
    result = compute((new, *tensors[1:]))
    return result.detach(), torch.autograd.grad(result, new)[0]


def mean(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[0] / pair[1]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_the_equations(kind: str, aggregation: Aggregation) -> None:
    weights = token_weights(mask(), aggregation)
    got = with_grad(inputs(), lambda x: mean(loss(kind, x, weights)))
    want = with_grad(inputs(), lambda x: dense(kind, x, aggregation))
    assert_close(got, want, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_splits_over_ranks_padding_and_order_change_nothing(
    kind: str, aggregation: Aggregation
) -> None:
    whole = loss(kind, inputs(), token_weights(mask(), aggregation))
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    sums = []
    for rank in (order[:1], order[1:2], order[2:]):  # the second rank has no token at all
        # padding holds whatever was there: infinities and NaN too
        tensors = [torch.cat([x[rank], torch.full((len(rank), 4), torch.nan)], 1) for x in inputs()]
        tensors = [torch.where(mask(width=WIDTH + 4)[rank], x, torch.inf) for x in tensors]
        tensors[3] = inputs()[3][rank][:, :1].expand_as(tensors[0])
        weights = token_weights(mask(width=WIDTH + 4)[rank], aggregation)
        sums.append(loss(kind, tuple(tensors), weights))
    assert_close(sum(s for s, _ in sums), whole[0], rtol=2e-6, atol=1e-9)
    assert sum(int(n) for _, n in sums) == int(whole[1])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_packing_and_a_split_over_context_change_nothing(
    kind: str, aggregation: Aggregation
) -> None:
    weights = token_weights(mask(), aggregation)
    want = loss(kind, inputs(), weights)

    def pack(x: Tensor) -> Tensor:
        return x[mask()][None]

    packed = tuple(pack(x) for x in inputs())

    def half(cut: slice) -> tuple[Tensor, Tensor]:
        part = weights.map(pack).map(lambda x: x[:, cut])
        return loss(kind, tuple(x[:, cut] for x in packed), part)

    first, second = half(slice(0, 7)), half(slice(7, None))
    assert_close(first[0] + second[0], want[0], rtol=2e-6, atol=1e-9)
    assert first[1] + second[1] == want[1]


@pytest.mark.parametrize("aggregation, count", [("token", 18), ("sequence", 5)])
def test_counts_are_integers(aggregation: str, count: int) -> None:
    weights = token_weights(mask(), aggregation)
    _, n = loss("kl", inputs(), weights)
    assert n == count and n.dtype == torch.long


@pytest.mark.parametrize("kind", KINDS)
def test_empty_completions_give_zero_and_no_nan(kind: str) -> None:
    weights = token_weights(torch.zeros(6, WIDTH), "sequence")
    tensors = tuple(torch.full_like(x, torch.nan) for x in inputs()[:3])
    new = tensors[0].clone().requires_grad_()
    total, count = loss(kind, (new, *tensors[1:], inputs()[3]), weights)
    assert total == 0 and count == 0
    assert_close(torch.autograd.grad(total, new)[0], torch.zeros_like(new))


@pytest.mark.parametrize(
    "ratio, advantage, passes",
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False), (1.1, 1.0, True)],
)
def test_the_clip_stops_gradients_only_where_the_loss_would_gain(
    ratio: float, advantage: float, passes: bool
) -> None:
    new = torch.tensor([[ratio]]).log().requires_grad_()
    weights = token_weights(torch.ones(1, 1), "token")
    old, signal = torch.zeros(1, 1), torch.tensor([[advantage]])
    total, _ = losses.policy_loss(new, old, signal, weights, CLIP)
    grad = torch.autograd.grad(total, new)[0]
    assert_close(grad, torch.tensor([[-ratio * advantage if passes else 0.0]]))


def test_k3_is_zero_at_equality_and_positive_elsewhere() -> None:
    new = inputs()[0]
    each = TokenWeights(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.long))
    assert losses.kl_loss(new, new, token_weights(mask(), "token"))[0] == 0
    for d in (-20.0, -1.0, -1e-6, 1e-6, 1.0, 5.0):
        reference = torch.full((1, 1), d, dtype=torch.float64)
        assert losses.kl_loss(torch.zeros_like(reference), reference, each)[0] > 0


def test_on_policy_losses_have_the_policy_gradient() -> None:
    """At the policy that sampled, the clipped loss and the target loss `reward` agree."""
    new, _, _, signal = inputs()
    weights = token_weights(mask(), "token")
    tensors = (new, new, new, signal)
    _, clipped = with_grad(tensors, lambda x: loss("policy", x, weights)[0])
    _, plain = with_grad(tensors, lambda x: loss("reward", x, weights)[0])
    assert_close(clipped, plain)


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
def test_a_clip_that_is_not_positive_is_refused(clip: float) -> None:
    weights = token_weights(mask(), "token")
    new, old, other, signal = inputs()
    with pytest.raises(ValueError, match="must be above 0"):
        losses.policy_loss(new, old, signal, weights, clip)
    with pytest.raises(ValueError, match="must be above 0"):
        losses.value_loss(new, old, other, weights, clip)


def test_a_signal_by_completion_has_two_dimensions() -> None:
    new, old, _, signal = (x[:, : len(LENGTHS)] for x in inputs())
    weights = token_weights(torch.ones_like(new), "token")
    with pytest.raises(ValueError, match=r"\[B, T\] or \[B, 1\], not \[6\]"):
        losses.policy_loss(new, old, signal[:, 0], weights, CLIP)
    with pytest.raises(ValueError, match=r"\[B, T\] or \[B, 1\], not \[6\]"):
        losses.gradient_loss(new, signal[:, 0], weights)
    one, each = (losses.gradient_loss(new, x, weights)[0] for x in (signal[:, :1], signal))
    assert_close(one, each)


def test_an_unknown_aggregation_is_refused() -> None:
    with pytest.raises(ValueError, match="'token' or 'sequence', not 'mean'"):
        token_weights(mask(), "mean")
