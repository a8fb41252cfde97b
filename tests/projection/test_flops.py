"""FLOPs of scoring equal what torch counts; `auto` takes what is stated."""

from collections.abc import Callable

import pytest
import torch
from _pairs import dense
from torch.utils.flop_counter import FlopCounterMode

from megatron_dr.projection import Kronecker, flops, gram_of, per_sample
from megatron_dr.projection.flops import Work, cheapest

FP32 = torch.float32
WORKS = [
    Work(40, 24, 4, 8, 0, 8, 4, True),
    Work(40, 24, 4, 8, 0, 8, 4, False),
    Work(40, 24, 4, 8, 2, 8, 4, True),
    Work(40, 24, 4, 8, 2, 8, 4, False),
    Work(16, 96, 3, 5, 1, 16, 4, True),
    Work(5, 7, 2, 3, 0, 9, 9, False),
]
OF_EVERY_WORK = pytest.mark.parametrize("work", WORKS, ids=str)


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def factors(work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    return dense(work.tokens, work.samples + work.targets, work.inner, work.out, FP32)


def products(work: Work, values_NK: torch.Tensor) -> None:
    """Of rows and target, as matrix products that torch counts."""
    rows_RK = values_NK[: work.samples + 1]
    if len(rows_RK) == work.samples:  # the target's own, from another pass
        rows_RK = torch.cat([rows_RK, rows_RK[:1]])
    if work.gram:
        gram_of(rows_RK[None])
    else:
        rows_RK @ rows_RK[-1:].t()


@OF_EVERY_WORK
def test_weight_gradient(work: Work) -> None:
    x, dy = per_sample.Weighted(*factors(work), None, None)
    assert counted(lambda: dy.t() @ x) == flops.weight_gradient(work)


@OF_EVERY_WORK
def test_exact(work: Work) -> None:
    def run() -> None:
        products(work, per_sample.gradients(*factors(work), work.out).flatten(1))

    assert counted(run) == flops.exact(work)


@OF_EVERY_WORK
def test_sketched(work: Work) -> None:
    sketch = Kronecker("w", work.out, work.inner, work.size_out, work.size_in, 0)
    p_out, p_in = (sketch.columns(side, None, "cpu", FP32) for side in ("out", "in"))

    def run() -> None:
        products(work, per_sample.sketch([factors(work)], p_out, p_in))

    assert counted(run) == flops.sketched(work)


@pytest.mark.parametrize("block", [2**26, 8 * 4**2, 8 * 8**2])
@OF_EVERY_WORK
def test_ghost(work: Work, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but products of single numbers, which torch does not count.

    In blocks the model is right where they have no remainder, and near it else.
    """
    monkeypatch.setattr(per_sample, "BLOCK", block)
    tokens, own = work.tokens * (work.samples + work.targets), work.tokens * work.targets
    x, dy = factors(work)
    targets = [(x[:, work.samples :], dy[:, work.samples :])]
    matrix = torch.ones(work.out, work.inner)
    singles, runs = 0, []
    if work.gram:
        singles += tokens * (tokens + min(tokens, per_sample.block_rows()))
        runs.append(lambda: per_sample.ghost_gram([(x, dy)]))
    if not work.targets:
        singles += 2 * tokens * min(work.out, work.inner)
        runs.append(lambda: per_sample.ghost_cross([(x, dy)], matrix))
    elif not work.gram:
        singles += 2 * tokens * own
        runs.append(lambda: per_sample.ghost_between([(x, dy)], targets))
    expected = flops.ghost(work) - singles
    whole = block == 2**26 or not work.gram or work == WORKS[0]
    counts = sum(counted(run) for run in runs)
    assert counts == pytest.approx(expected, rel=0 if whole else 0.35)


def test_ghost_forms_the_gradient_of_a_long_target() -> None:
    """That, and its products with all samples: fewer FLOPs than its tokens' with all tokens."""
    work = Work(8, 6, 4, 50, 2, 8, 4, False)
    x, dy = factors(work)

    def run() -> None:
        target_NOI = per_sample.gradients(x[:, work.samples :], dy[:, work.samples :], work.out)
        per_sample.ghost_cross([(x, dy)], target_NOI.sum(0))

    assert counted(run) == flops.ghost(work) - 2 * 300 * 6
    assert flops.ghost(work) < 2 * 300 * 100 * (8 + 6 + 1)


@pytest.mark.parametrize("samples", [1, 8, 64])
@pytest.mark.parametrize("tokens", [1, 16, 256, 4096])
@pytest.mark.parametrize("targets", [0, 2])
@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("length", [8, 64, 4096])
def test_auto(samples: int, tokens: int, targets: int, gram: bool, length: int) -> None:
    work = Work(length, length, samples, tokens, targets, 64, 64, gram)
    cost = {score: getattr(flops, score)(work) for score in ("exact", "ghost", "sketched")}
    chosen = cheapest(work)
    spare = flops.weight_gradient(work) / 10
    assert cost[chosen] <= min(cost.values()) + spare
    if chosen == "sketched":
        assert min(cost["exact"], cost["ghost"]) > cost["sketched"] + spare
    else:
        assert cost[chosen] == min(cost["exact"], cost["ghost"])


def test_auto_takes_each() -> None:
    """Short samples: products of tokens. Small weights: all of it. Long ones: sketches."""
    assert cheapest(Work(4096, 4096, 8, 1, 1, 64, 64, True)) == "ghost"
    assert cheapest(Work(32, 32, 8, 1024, 0, 64, 64, True)) == "exact"
    assert cheapest(Work(4096, 4096, 8, 1024, 0, 64, 64, True)) == "sketched"
    for tokens, chosen in ((26, "ghost"), (27, "sketched")):  # 9.5% and 10.03% more
        assert cheapest(Work(4096, 4096, 8, tokens, 2, 64, 64, True)) == chosen


def test_auto_of_equals_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "ghost", flops.exact)
    assert cheapest(Work(32, 32, 8, 1024, 0, 64, 64, True)) == "exact"
