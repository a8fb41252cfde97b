"""Domain rows and target ranks equal the oracle's, in layouts that treat them differently."""

from ._data import Layout
from ._layouts import check
from ._pairs import pairs
from ._problem import Problem

DOMAINS = {
    "world1": Layout(domains=3, sequences=4),
    "dp2-distopt": Layout(dp=2, domains=3, distributed_optimizer=True),
    "dp2-token": Layout(dp=2, domains=3, per_token=True),
    "dp2-one-each": Layout(dp=2, domains=2, sequences=1),
    "tp2-pp2-sp-tied-token": Layout(
        tp=2, pp=2, domains=3, sequence_parallel=True, tied=True, per_token=True
    ),
    "cp2": Layout(cp=2, domains=3, full_masks=True),
    "pp2-vpp2": Layout(pp=2, vpp=2, domains=3),
}
TARGET_RANKS = {
    "dp4-one": Layout(dp=4, target_ranks=1, distributed_optimizer=True),
    "dp4-two": Layout(dp=4, target_ranks=2),
    "dp3-overlap": Layout(dp=3, target_ranks=1, overlap=True, distributed_optimizer=True),
    "dp4-token": Layout(dp=4, target_ranks=1, per_token=True),
    "dp2-tp2-sp": Layout(dp=2, tp=2, target_ranks=1, sequence_parallel=True),
    "dp2-pp2-vpp2-tied": Layout(dp=2, pp=2, vpp=2, target_ranks=1, tied=True),
    "dp2-cp2-token": Layout(dp=2, cp=2, target_ranks=1, per_token=True),
}
GRAMS = ("exact", "sketch")


@pairs(DOMAINS, GRAMS)
def test_domain_rows(first: str, second: str) -> None:
    # Adam turns a small gradient's rounding, here of fp32 sketches, into a step
    check(DOMAINS[first], Problem(gram=second), atol=2e-5 if second == "exact" else 1e-4)


@pairs(TARGET_RANKS, GRAMS)
def test_target_ranks(first: str, second: str) -> None:
    check(TARGET_RANKS[first], Problem(gram=second))


def test_mean_of_domain_rows_weighs_corpora_alike() -> None:
    check(Layout(dp=2, domains=3, targets=0), Problem(set="mean", alpha=0.0), atol=1e-4)
