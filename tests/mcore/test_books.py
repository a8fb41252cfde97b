"""What Megatron keeps beside gradients is the general role's: a target that is only measured
changes no weight, no router's bias, no logged number, no random state."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossLoggingHelper
from megatron.core.transformer.moe import moe_logging

from megatron_dr import DRConfig
from megatron_dr.mcore.compat import versions
from megatron_dr.mcore.step import books
from megatron_dr.mcore.step.roles import MicrobatchRouter

from . import _books
from ._books import Run
from ._data import Layout
from ._ranks import run_ranks

SLOTS = DRConfig(set="mean", alpha=0.0, slots=2, norm="none")
SAMPLES = DRConfig(set="mean", alpha=0.0, rows="sample", blocks="matrix", norm="none")
TWICE = DRConfig(set="mean", alpha=0.0, rows="sample", passes=2, norm="none")
EVERY = ("every loss", "expert bias", "quantiles", "forced")
ALONE = Layout(moe=True, full_masks=True)
LAYOUTS = {
    "alone": (ALONE, EVERY),
    "PP 2": (Layout(moe=True, full_masks=True, pp=2, recompute=True), ("every loss", "forced")),
    "PP 2 x 2": (Layout(moe=True, pp=2, vpp=2, per_token=True), ("every loss", "forced")),
    "DP 2": (Layout(moe=True, dp=2, ep=2, per_token=True), ("every loss", "expert bias")),
}
Found = dict[str, torch.Tensor]


def differing(stock: Found, found: Found) -> list[str]:
    assert stock.keys() == found.keys()
    return [name for name, value in stock.items() if not torch.equal(found[name], value)]


@pytest.mark.parametrize("layout, routers", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_measured_target_leaves_no_trace(layout: Layout, routers: tuple[str, ...]) -> None:
    """Bit for bit. As many target microbatches as general ones: undoing Megatron's division by
    their sum is a multiplication by two, which is exact."""
    runs = [Run(router, dr) for router in routers for dr in (None, SLOTS)]
    for found in run_ranks(layout.world, _books.many, layout, runs):
        for router, stock, ours in zip(routers, found[::2], found[1::2], strict=True):
            assert differing(stock, ours) == [], router


def test_nor_with_sample_rows() -> None:
    """They form gradients by sums of their own, so weights and norms are Megatron's to rounding."""
    modes = (None, SAMPLES, TWICE)
    still = [Run(router, dr, lr=0.0) for router in EVERY for dr in modes]
    moving = [Run("every loss", dr) for dr in modes]
    (found,) = run_ranks(1, _books.many, ALONE, still + moving)
    for stock, *ours in zip(*(found[n : len(still) : 3] for n in range(3)), strict=True):
        for each in ours:
            assert [name for name in differing(stock, each) if not name.endswith("norm")] == []
    stock, *ours = found[len(still) :]
    for each in ours:
        for name, value in stock.items():
            torch.testing.assert_close(each[name], value, rtol=1e-4, atol=1e-5, msg=name)


# -- a target that is trained on -------------------------------------------------------------------
MIXED = {
    "slots": (0.25, DRConfig(set="mean", alpha=0.25, slots=2)),
    "two passes": (0.25, DRConfig(set="mean", alpha=0.25, rows="sample", passes=2)),
    "target": (1.0, DRConfig(set="target", rows="rank")),
}


def test_tokens_count_for_a_bias_as_their_role_does_in_the_update() -> None:
    layout, numbers = Layout(moe=True, dp=2), (2, 4)
    alone = [Run("expert bias"), Run("expert bias", role="target", numbers=(4, 0))]
    runs = alone + [Run("expert bias", dr, numbers=numbers) for _, dr in MIXED.values()]
    for general, target, *found in run_ranks(2, _books.many, layout, runs):
        counts = [name for name in general if name.startswith("step 0") and "tokens_per" in name]
        assert len(counts) == 2
        for (share, _), each in zip(MIXED.values(), found, strict=True):
            for name in counts:
                expected = (1 - share) * general[name] + share * target[name] / 2
                torch.testing.assert_close(each[name], expected)


def test_share_of_a_set_that_holds_the_target() -> None:
    halfspace = DRConfig(set="halfspace").feasible_set()
    assert halfspace.target_share(0.0) == 0.5 and halfspace.target_share(1.0) == 1.0


@pytest.mark.skipif(versions.INSTALLED <= (0, 18), reason="Megatron 0.18 has no such balancing")
def test_quantiles_too() -> None:
    runs = [Run("quantiles"), Run("quantiles", role="target"), Run("quantiles", MIXED["slots"][1])]
    ((general, target, found),) = run_ranks(1, _books.many, ALONE, runs)
    quantiles = [name for name in general if name.startswith("step 0") and "accum" in name]
    assert len(quantiles) == 2
    for name in quantiles:
        expected = (0.75 * general[name] + 0.25 * target[name]) / 2  # means over two microbatches
        torch.testing.assert_close(found[name], expected)
        assert found[name.replace("accum", "count")] == 1


# -- ranks of one role -----------------------------------------------------------------------------
def test_ranks_of_the_target_add_nothing() -> None:
    """A rank runs the target and one the general role: as the second by itself."""
    routers = ("sequence loss", "expert bias", "quantiles")
    layout = Layout(moe=True, full_masks=True, dp=2, target_ranks=1)
    dr = DRConfig(set="mean", alpha=0.0, rows="rank", target_ranks=1, norm="none")
    (stock,) = run_ranks(1, _books.many, ALONE, [Run(router) for router in routers])
    ranks = run_ranks(2, _books.many, layout, [Run(router, dr) for router in routers])
    for found in ranks:
        for router, expected, each in zip(routers, stock, found, strict=True):
            for name, value in expected.items():
                if name.endswith((*_books.COUNTS, "lm loss", "random state")):
                    continue  # of a rank
                torch.testing.assert_close(each[name], value, msg=f"{router}, {name}")


def refusal(dr: DRConfig, router: str) -> str:
    """On a rank."""
    try:
        _books.many(Layout(moe=True, dp=dist.get_world_size()), [Run(router, dr)])
    except ValueError as error:
        return str(error)
    return ""


def test_what_mixes_roles_is_refused() -> None:
    ranks = DRConfig(set="cone", rows="rank", target_ranks=1)
    merged = DRConfig(set="topk", rows="sample", target_pass="merged")
    for said in run_ranks(2, refusal, ranks, "every loss"):
        assert "or --dr-target-ranks 0" in said
    for router, flag in (
        ("every loss", "moe-aux-loss-coeff"), ("quantiles", "load-balancing-type quantile"),
    ):  # fmt: skip
        (said,) = run_ranks(1, refusal, merged, router)
        assert flag in said and "--dr-target-pass own" in said


# -- what Megatron keeps only on a GPU -------------------------------------------------------------
class Attention(torch.nn.Module):
    """As Transformer Engine's does for QK clipping, and a sparse one's for the log."""

    def __init__(self) -> None:
        super().__init__()
        self.current_max_attn_logits: torch.Tensor | None = None

    def forward(self, largest: float) -> None:
        new, old = torch.tensor([largest]), self.current_max_attn_logits
        self.current_max_attn_logits = new if old is None else torch.maximum(new, old)
        DSAIndexerLossLoggingHelper.save_loss_to_tracker(new[0], 1, 1)
        moe_logging.get_moe_metrics_tracker().record("z_loss", new[0], 1, 1)


def logged() -> list[float]:
    """Of both trackers, which are new again."""
    entries = moe_logging.get_moe_metrics_tracker().metrics
    moe_logging.destroy_moe_metrics_tracker()
    return [
        float(DSAIndexerLossLoggingHelper.tracker.pop("values")),
        float(entries["z_loss"].values),
    ]


CASES = {  # of roles, share, ranks: the largest logit, the indexer's loss
    "measured": ((1, 2), 0.0, 1.0, 3.0, 3.0),
    "trained on": ((1, 2), 0.5, 1.0, 9.0, 3.0),
    "ranks of the target": ((0, 2), 0.0, 4.0, float("-inf"), 0.0),
    "ranks of the general role": ((1, 0), 0.0, 4 / 3, 3.0, 4.0),
}


@pytest.mark.parametrize("numbers, share, ranks, largest, loss", CASES.values(), ids=CASES.keys())
def test_largest_logits_and_losses_for_the_log(
    numbers: tuple[int, int], share: float, ranks: float, largest: float, loss: float,
) -> None:  # fmt: skip
    general, target = numbers
    model, router = Attention(), MicrobatchRouter([], target, general, None)
    with books.opened([model], router) as both:
        for is_target, value in [(True, 9.0)] * target + [(False, 3.0)] * general:
            both.open(is_target, forward=True)
            model(value)
        both.open(target > 0, forward=False)
        both.settle(share, ranks)
    assert model.current_max_attn_logits == largest
    assert logged() == pytest.approx([loss, loss])


def test_passes_that_leave_nothing() -> None:
    model, router = Attention(), MicrobatchRouter([], 1, 1, None)
    model(5.0)
    random = torch.get_rng_state()
    with pytest.raises(KeyError), books.opened([model], router, kept=False) as both:
        both.open(False, forward=True)
        model(9.0)
        both.open(True, forward=True)
        torch.rand(3)
        raise KeyError
    assert model.current_max_attn_logits == 5.0
    assert logged() == [5.0, 5.0]
    assert torch.equal(torch.get_rng_state(), random)
