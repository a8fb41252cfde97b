"""Exact or sketched grams: what each leaves to be done when the backward is over, and which one a
run uses.

    seconds exposed = bytes inside a node / 350 GB/s + bytes between nodes / 45 GB/s   (an H100's)
                      + with sketches E (312 + 24 L) bytes / 2.7 TB/s

of all that a rank sends in a step after its backward, Megatron's reduction included: that of exact
rows is their exchange. What travels in the backward counts as hidden, as it is in plain Megatron:
with `--overlap-grad-reduce` each exact row's exchange but the last bucket, which rides the backward
of that row's own last microbatch. Sketches hide nothing: they need whole gradients, and Megatron's
reduction the weights. Making them reads and writes each of a rank's E elements so often, of L local
buffers (`megatron_dr/plan/reads.py`). What exact rows do in memory then is a twentieth of it at
most, and is left out.
"""

from typing import Any

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore import collectives
from megatron_dr.mcore.buffer_rows import exact_gram, sketched_gram
from megatron_dr.mcore.buffer_rows.buffers import Buffers
from megatron_dr.mcore.buffer_rows.exact_gram import ExactGram
from megatron_dr.mcore.buffer_rows.layout import Layout
from megatron_dr.mcore.buffer_rows.levels import Sent
from megatron_dr.mcore.buffer_rows.sketched_gram import SketchedGram
from megatron_dr.plan.choice import sketching
from megatron_dr.projection import size_for


def choose(
    config: DRConfig, buffers: Buffers, layout: Layout, model: list[Any]
) -> tuple[ExactGram | SketchedGram, str]:
    """The source of grams, and a sentence that says why (collective).

    `auto` takes what is exposed for less time, on the rank where it takes longest.

    Raises:
        ValueError: exact rows, and instances of the distributed optimizer that can't share.
    """
    size = config.sketch_size or size_for(config.wanted_error, layout.row_map.num_vectors)
    source = SketchedGram(buffers, layout, size, config.seed)
    made = sketching(sum(b.grad_data.numel() for b in buffers.buffers), layout.row_map.local)
    sketched, made = _longest(sketched_gram.exposed(model, layout, size), made)
    costs = (
        f"{_said(sketched)} with sketches of {size:,} elements, which take {made * 1e3:,.3g} ms to "
        "make"
    )
    kind, why, exact = config.gram, "as asked", None
    if kind != "sketch":
        exact = ExactGram(buffers, layout, model)
        whole, _ = _longest(exact_gram.exposed(exact))
        costs = f"{_said(whole)} with exact rows, {costs}"
    if kind == "auto":
        kind = "exact" if whole.seconds <= sketched.seconds + made else "sketch"
        why = "auto: less time exposed"
    buffers.own_target = kind == "sketch"
    sentence = f"{kind} gram ({why}): a rank sends after the backward at most {costs}"
    return (source if kind == "sketch" or exact is None else exact), sentence


def _longest(sent: Sent, made: float = 0.0) -> tuple[Sent, float]:
    """That of the rank which it takes longest, and its seconds to make sketches (collective)."""
    of_ranks: list[tuple[Sent, float]] = collectives.of_all_ranks((sent, made))
    return max(of_ranks, key=lambda one: one[0].seconds + one[1])


def _said(sent: Sent) -> str:
    return (
        f"{sent.inside:,.0f} bytes inside its node and {sent.between:,.0f} between nodes, in "
        f"{sent.seconds * 1e3:,.3g} ms,"
    )
