"""Exact or sketched grams: what each sends, which one a run uses, and why."""

from typing import Any

import torch
import torch.distributed as dist

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore.buffer_rows import exact_gram, sketched_gram
from megatron_dr.mcore.buffer_rows.buffers import Buffers
from megatron_dr.mcore.buffer_rows.exact_gram import ExactGram
from megatron_dr.mcore.buffer_rows.layout import Layout
from megatron_dr.mcore.buffer_rows.sketched_gram import SketchedGram
from megatron_dr.projection import size_for


def choose(
    config: DRConfig, buffers: Buffers, layout: Layout, model: list[Any]
) -> tuple[ExactGram | SketchedGram, str]:
    """The source of grams, and a sentence that says why (collective).

    `auto` takes what sends fewer bytes beside Megatron's own reduction, on the rank that sends
    most; where both send the same, the exact gram.
    """
    size = config.sketch_size or size_for(config.sketch_error, layout.row_map.num_vectors)
    exact = ExactGram(buffers, layout, model)
    bytes_each = torch.tensor(
        [exact_gram.extra_bytes(exact), sketched_gram.extra_bytes(layout, size)],
        dtype=torch.float64, device=buffers.device,
    )  # fmt: skip
    dist.all_reduce(bytes_each, op=dist.ReduceOp.MAX)
    whole, sketched = (int(x) for x in bytes_each.tolist())
    kind, why = config.gram, "as asked"
    if kind == "auto":
        kind, why = "exact" if whole <= sketched else "sketch", "auto: fewer bytes"
    sentence = (
        f"{kind} gram ({why}): beside Megatron's own reduction a rank sends at most {whole:,} "
        f"bytes a step with exact rows, {sketched:,} with sketches of {size:,} elements"
    )
    buffers.own_target = kind == "sketch"
    if kind == "exact":
        return exact, sentence
    return SketchedGram(buffers, layout, size, config.seed), sentence
