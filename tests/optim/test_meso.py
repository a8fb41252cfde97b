"""MeSO against torch's AdamW and SGD, and against the equations written out."""

import copy
import functools
import math
from typing import Any

import pytest
import torch

from megatron_dr.optim import MesoAdamW, MesoSGD, Shard, Subspaces

from ._meso import (
    FORMS,
    IN,
    K_IN,
    K_OUT,
    OUT,
    FirstAxes,
    Same,
    assert_equal,
    dense,
    gradients,
    make,
    parameters,
    train,
)

TORCHS = [
    pytest.param(
        MesoAdamW, torch.optim.AdamW,
        {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}, id="adamw",
    ),
    pytest.param(MesoSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.7}, id="sgd"),
]  # fmt: skip


@pytest.mark.parametrize("form, stock, options", TORCHS)
@pytest.mark.parametrize("sizes", [(OUT, IN), (512, 512)])
def test_nothing_compressed_is_torchs(
    form: Any, stock: Any, options: Any, sizes: tuple[int, int]
) -> None:
    ours, theirs = parameters(), parameters()
    train(form(ours, size_out=sizes[0], size_in=sizes[1], refresh=3, **options), ours, 0, 10)
    train(stock(theirs, **options), theirs, 0, 10)
    assert_equal(ours, theirs)


@pytest.mark.parametrize("form, stock, options", TORCHS)
def test_subspace_of_axes_is_torchs_on_them(form: Any, stock: Any, options: Any) -> None:
    """P and Q the first axes: torch's optimizer on that corner, but for the learning rate's s."""
    ours, theirs = parameters()[:1], parameters()[:1]
    decay = options.pop("weight_decay", 0.0)
    size = {"size_out": K_OUT, "size_in": K_IN}
    optimizer = form(ours, **size, subspaces=FirstAxes(), weight_decay=decay, **options)
    scale = math.sqrt(OUT * IN / (K_OUT * K_IN)) if form is MesoAdamW else 1.0
    train(optimizer, ours, 0, 10)
    lr = options["lr"]
    twin = stock(theirs, **{**options, "lr": lr * scale, "weight_decay": 0.0})
    corner = torch.zeros(OUT, IN, dtype=torch.float64)
    corner[:K_OUT, :K_IN] = 1.0
    for step in range(10):
        theirs[0].data.mul_(1.0 - lr * decay)
        theirs[0].grad = gradients(step, theirs)[0] * corner
        twin.step()
    assert_equal(ours, theirs)


@pytest.mark.parametrize("form, options", FORMS)
def test_equations(form: Any, options: Any) -> None:
    """Three epochs of the module's equations, written out for one matrix."""
    own, weight = parameters()[:1], parameters()[0].detach()
    optimizer = make(form, own, options)
    train(optimizer, own, 0, 12)
    mean = square = torch.zeros(K_OUT, K_IN, dtype=torch.float64)
    for step in range(12):
        p, q = dense(step, optimizer)
        if step in (4, 8):
            old_p, old_q = dense(step - 1, optimizer)
            t, r = p @ old_p.T, q @ old_q.T
            mean = t @ mean @ r.T
            seen = torch.einsum("ka,lb,ab->kl", t**2, r**2, square)
            share = torch.einsum("ka,lb->kl", t**2, r**2)
            square = seen + (1 - share) * square.mean()
        c = p @ gradients(step, own)[0] @ q.T
        weight = weight * (1 - 0.05 * 0.2)
        if form is MesoSGD:
            mean = 0.9 * mean + c
            weight = weight - 0.05 * p.T @ mean @ q
        else:
            mean, square = 0.9 * mean + 0.1 * c, 0.95 * square + 0.05 * c**2
            u = mean / (1 - 0.9 ** (step + 1))
            u = u / ((square / (1 - 0.95 ** (step + 1))).sqrt() + 1e-6)
            weight = weight - 0.05 * math.sqrt(OUT * IN / (K_OUT * K_IN)) * p.T @ u @ q
    assert_equal(own, [weight], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form, options", FORMS)
def test_refresh_to_the_same_subspace_changes_nothing(form: Any, options: Any) -> None:
    always, never = parameters(), parameters()
    train(make(form, always, options, refresh=1, subspaces=Same()), always, 0, 8)
    train(make(form, never, options, refresh=0, subspaces=Same()), never, 0, 8)
    assert_equal(always, never, rtol=1e-6, atol=1e-6)  # their fp32 numbers made orthonormal in fp64


@pytest.mark.parametrize("form, options", FORMS)
def test_refresh_changes_the_subspace(form: Any, options: Any) -> None:
    always, never = parameters(), parameters()
    train(make(form, always, options, refresh=1), always, 0, 2)
    train(make(form, never, options, refresh=0), never, 0, 2)
    assert not torch.allclose(always[0], never[0])
    torch.testing.assert_close(always[1], never[1])  # a vector has none


def test_gradient_in_the_subspace_is_reproduced() -> None:
    """SGD's first step is -lr G for it, and -lr times G's nearest such matrix for any other."""
    own = parameters()[:1]
    optimizer = make(MesoSGD, own, weight_decay=0.0, lr=1.0)
    p, q = dense(0, optimizer)
    inside = p.T @ gradients(0, own)[0][:K_OUT, :K_IN] @ q
    before = own[0].detach().clone()
    own[0].grad = inside.clone()
    optimizer.step()
    torch.testing.assert_close(before - own[0], inside)
    gradient = gradients(1, own)[0]
    before, own[0].grad = own[0].detach().clone(), gradient
    optimizer.step()
    left = gradient - (before - own[0])
    assert_equal([p @ left @ q.T], [torch.zeros(K_OUT, K_IN, dtype=left.dtype)])


def test_adamw_moves_elements_as_far_as_adamw() -> None:
    """Root mean square of the first update: lr, as AdamW's, where a matrix is large."""
    weight = torch.nn.Parameter(torch.zeros(300, 200))
    optimizer = MesoAdamW([weight], lr=0.01, weight_decay=0.0, size_out=30, size_in=40)
    weight.grad = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("form, options", FORMS)
def test_who_shares_the_projections_changes_nothing(form: Any, options: Any) -> None:
    """An object of one's own, or one used by scores and other optimizers too: bit for bit."""
    alone, shared, other = parameters(), parameters(), parameters(1)
    train(make(form, alone, options, subspaces=Subspaces(5)), alone, 0, 9)
    common = Subspaces(5)
    optimizer = make(form, shared, options, subspaces=common)
    neighbour = make(form, other, options, subspaces=common, refresh=2)
    for step in range(9):
        optimizer.compress(shared[0], gradients(step + 50, shared)[0])  # a score
        common.rows("out", OUT, K_OUT, 7, shared[0])
        train(neighbour, other, step, step + 1)
        train(optimizer, shared, step, step + 1)
    for a, b in zip(alone, shared, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form, options", FORMS)
def test_compressing_commutes_with_sums_and_clipping(form: Any, options: Any) -> None:
    """C is linear in G: of a sum over samples it is the sum, and clipped first is clipped after."""
    own = parameters()
    optimizer = make(form, own, options)
    first, second = gradients(0, own)[0], gradients(1, own)[0]
    c = optimizer.compress
    assert_equal([c(own[0], first + 2.0 * second)], [c(own[0], first) + 2.0 * c(own[0], second)])
    for parameter, gradient in zip(own, gradients(0, own), strict=True):
        parameter.grad = gradient
    norm = math.sqrt(sum(g.square().sum() for g in gradients(0, own)))
    torch.nn.utils.clip_grad_norm_(own, 1.0)
    for parameter, gradient in zip(own, gradients(0, own), strict=True):
        clipped = c(parameter, parameter.grad)
        assert_equal([clipped], [c(parameter, gradient) / norm], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("form, options", FORMS)
def test_tied_weight_has_one_state(form: Any, options: Any) -> None:
    """One parameter in two places gets its summed gradient once; two tied copies stay equal."""
    model = torch.nn.Sequential(torch.nn.Embedding(OUT, IN), torch.nn.Linear(IN, OUT, bias=False))
    model[1].weight = model[0].weight
    optimizer = make(form, model.parameters(), options)
    assert len(optimizer.param_groups[0]["params"]) == 1
    own = torch.nn.Parameter(model[0].weight.detach().clone())
    twin = make(form, [own], options)
    for step in range(6):
        tokens = torch.arange(8) + step
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(tokens), tokens).backward()
        own.grad = model[0].weight.grad.clone()
        optimizer.step()
        twin.step()
    assert torch.equal(own, model[1].weight)
    assert len(optimizer.state) == 1


@pytest.mark.parametrize("form, options", FORMS)
@pytest.mark.parametrize("at", [3, 4, 5])  # before, at and after a refresh
def test_resumed_run_equals_uninterrupted_one(form: Any, options: Any, at: int) -> None:
    whole, parts = parameters(), parameters()
    train(make(form, whole, options), whole, 0, 10)
    first = make(form, parts, options)
    train(first, parts, 0, at)
    saved = copy.deepcopy(first.state_dict())
    second = make(form, parts, options)
    second.load_state_dict(saved)
    train(second, parts, at, 10)
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("change", [{"size_in": 4}, {"refresh": 5}, {"subspaces": Subspaces(1)}])
def test_other_projections_than_the_checkpoints_are_refused(change: dict[str, Any]) -> None:
    own = parameters()
    optimizer = make(MesoAdamW, own)
    train(optimizer, own, 0, 2)
    with pytest.raises(ValueError, match="the checkpoint's MeSO has"):
        make(MesoAdamW, own, **change).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="not MeSO"):
        optimizer.load_state_dict(torch.optim.AdamW(own).state_dict())


def test_state_is_small() -> None:
    own = parameters()
    optimizer = make(MesoAdamW, own)
    train(optimizer, own, 0, 9)
    shapes = [tuple(optimizer.state[p]["exp_avg_sq"].shape) for p in own]
    assert shapes == [(K_OUT, K_IN), (IN,), (K_OUT, 4), (3, 4)]
    sizes = [K_OUT * K_IN, IN, K_OUT * 4, 12]
    assert optimizer.moment_bytes() == (16 * sum(sizes), 16 * sum(p.numel() for p in own))
    kept = 8 * K_OUT * OUT, 8 * K_IN * IN  # both tall matrices use the same P
    assert sorted(optimizer.projection_bytes().values()) == sorted(kept)
    assert sum(p.nbytes for p in optimizer.subspaces._kept.values()) == sum(kept)


@pytest.mark.parametrize("sizes", [(K_OUT, K_IN), (OUT, K_IN), (K_OUT, IN), (OUT, IN)])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("form, options", FORMS)
def test_shards_move_as_the_whole(
    form: Any, options: Any, dim: int, sizes: tuple[int, int], monkeypatch: Any
) -> None:
    """Four quarters, each rank with the first and third or second and fourth: the sum of shares."""
    whole = parameters()[:1]
    options = {**options, "size_out": sizes[0], "size_in": sizes[1]}
    one = make(form, whole, options)
    quarter = whole[0].shape[dim] // 4
    columns = [tuple((n * quarter, (n + 1) * quarter) for n in pair) for pair in ((0, 2), (1, 3))]
    index = [torch.cat([torch.arange(a, b) for a, b in c]) for c in columns]
    parts = [torch.nn.Parameter(whole[0].detach().index_select(dim, i)) for i in index]
    ranks = [make(form, [part], options) for part in parts]
    for rank, part, own in zip(ranks, parts, columns, strict=True):
        rank.shards[part] = Shard(dim, whole[0].shape[dim], own, None)
    for step in range(9):
        gradient = gradients(step, whole)[0]
        shares = [
            rank.compress(part, gradient.index_select(dim, i))
            for rank, part, i in zip(ranks, parts, index, strict=True)
        ]
        total = (shares[0] + shares[1]).reshape(-1)
        summed = functools.partial(lambda total, flat, group: flat.copy_(total), total)
        monkeypatch.setattr(torch.distributed, "all_reduce", summed)
        for rank, part, i in zip(ranks, parts, index, strict=True):
            part.grad = gradient.index_select(dim, i)
            rank.step()
        whole[0].grad = gradient
        one.step()
    for part, i in zip(parts, index, strict=True):
        assert_equal([part], [whole[0].detach().index_select(dim, i)], rtol=1e-10, atol=1e-10)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="size_out must be at least 1"):
        make(MesoAdamW, parameters(), size_out=0)
    with pytest.raises(ValueError, match="refresh must be at least 0"):
        make(MesoSGD, parameters(), refresh=-1)
