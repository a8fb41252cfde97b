"""What a rank keeps, in bytes by part. Activations are not in it: they are the same in both.

Legend: E elements of a rank's gradient buffers, D ranks of a group, B blocks, P sums of `rows.py`.
"""

from megatron_dr.plan.buffers import Stage
from megatron_dr.plan.rows import Rows

_CHUNK = 1 << 25  # elements that travel at a time without overlap (`exchange.py`)
_PRODUCT = 1 << 20  # elements that are multiplied at a time (`exact_gram.py`)


def plain(stage: Stage) -> dict[str, float]:
    """Weights, gradients and Adam's state of Megatron-Core with fp32 or 16-bit weights.

    With 16-bit weights the optimizer keeps fp32 ones, and of 16-bit gradients fp32 ones too
    (`core/optimizer/distrib_optimizer.py`, optimizer.py: Float16OptimizerWithFloat16Params).
    """
    layout, sharded = stage.layout, stage.layout.distributed_optimizer
    numel, filled = sum(b.numel for b in stage.buffers), sum(b.filled for b in stage.buffers)
    each = 8
    if layout.weight_bytes < 4:
        each += 4 + (4 if layout.gradient_bytes < 4 else 0)
    owned = sum(b.filled / len(b.group) for b in stage.buffers) if sharded else filled
    return {
        "weights": layout.weight_bytes * (numel if sharded else filled),
        "gradients": layout.gradient_bytes * numel,
        "optimizer": each * owned,
    }


def ours(stage: Stage, rows: Rows) -> dict[str, float]:
    """What the plugin keeps beside it in a step (`buffers.py`, `exchange.py`, `exact_gram.py` and
    `sketched_gram.py` of `megatron_dr/mcore/buffer_rows/`).

    The target is a shard of its sum, or of each half; with sketches a whole buffer, or two.
    """
    layout, counts = stage.layout, rows.of(stage.layout)
    elements = sum(b.numel for b in stage.buffers)
    slots = (rows.slots - 1) * rows.slot_bytes * elements
    if not rows.exact:
        target = counts.targets * layout.gradient_bytes * elements
        sketches = 4 * rows.sketch * (rows.slots + counts.targets) * rows.blocks
        grams = sketches * (1 + layout.data / len(layout.model_group()))
        return {"slots": slots, "target": target, "in flight": 0, "grams": grams}
    shards = counts.targets * (2 if counts.halved_by_group else 1)
    return {
        "slots": slots,
        "target": shards * layout.gradient_bytes * sum(b.shard for b in stage.buffers),
        "in flight": _in_flight(stage, rows),
        "grams": 8 * (rows.blocks * counts.sums**2 + 2 * min(_PRODUCT, elements)),
    }


def _in_flight(stage: Stage, rows: Rows) -> float:
    """Copies of ranges that are travelling, of the role that needs more; with overlap two at a time
    (`exchange.py`)."""
    counts, gradient = rows.of(stage.layout), stage.layout.gradient_bytes
    slot = max(gradient, rows.slot_bytes) if rows.slots > 1 else gradient
    general = _flights(stage, counts.groups, slot, rows.slots)
    target = _flights(stage, 2 if counts.halved_by_group else 1, gradient, counts.targets)
    return max(general, target)


def _flights(stage: Stage, classes: int, each: int, local: int) -> float:
    """Of so many local buffers, one after the other. A range (`route.py`, steps) is received, E;
    where classes have several ranks it is first put in the order of its shards, E, and every class'
    sum received. When a range lands, that sum is sent on, and received.

    That a tied embedding travels by itself without the distributed optimizer (`units.py`) is left
    out: a smaller range.
    """
    overlap, out = stage.layout.overlap, []
    for buffer, numel in stage.ready * local:
        ranks = len(buffer.group)
        sums = classes / ranks if 1 < classes < ranks else 0.0
        copies = 0.0 if ranks == 1 else 1 / ranks if classes == 1 else 1 + sums
        pieces = 1 if overlap or numel <= _CHUNK else 2  # a piece is not contiguous
        travels = pieces * (numel if overlap else min(numel, _CHUNK)) * each
        out.append((copies * travels, sums * travels))
    behind = [flying if overlap else 0.0 for flying, _ in out[1:]] + [0.0]
    held = [sum(first) + second for first, second in zip(out, behind, strict=False)]
    return max(held, default=0.0)
