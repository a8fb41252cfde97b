"""What a rank keeps, in bytes by part. Activations are in `activations.py`.

Legend: D ranks of a group, R classes of them whose gradients are summed (`route.py`), P sums of
`rows.py`.
"""

from itertools import pairwise

from megatron_dr.plan.buffers import Stage
from megatron_dr.plan.rows import Rows

# Elements that travel at a time after the backward, and in it (`exchange.py`), and that are
# multiplied at a time on a GPU (`exact_gram.py`).
CHUNK, BUCKET, PRODUCT = 1 << 25, 1 << 26, 1 << 25


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
    return {
        "weights": layout.weight_bytes * (numel if sharded else filled),
        "gradients": layout.gradient_bytes * numel,
        "optimizer": each * owned(stage),
    }


def owned(stage: Stage) -> float:
    """Elements whose optimizer state a rank keeps."""
    sharded = stage.layout.distributed_optimizer
    return sum(b.filled / (len(b.group) if sharded else 1) for b in stage.buffers)


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
        return {"slots": slots, "target": target, "in flight": 0.0, "grams": grams}
    shard = sum(b.shard for b in stage.buffers)
    factors = 4 * min(PRODUCT, counts.sums * shard) * copies(stage, rows)
    return {
        "slots": slots,
        "target": counts.targets * counts.halves * layout.gradient_bytes * shard,
        "in flight": _in_flight(stage, rows),
        "grams": 8 * rows.blocks * counts.sums**2 + factors,
    }


def parts(stage: Stage, rows: Rows) -> int:
    """Matrices in which a shard's vectors lie: of each slot, and of the target."""
    return rows.slots + rows.of(stage.layout).targets


def copies(stage: Stage, rows: Rows) -> float:
    """In fp32 of the vectors that are multiplied (`projection/gram.py`, gram_of_long): of what has
    16 bits, and of all where they lie in more than two matrices."""
    counts = rows.of(stage.layout)
    half = 1.0 if stage.layout.gradient_bytes < 4 else 0.0
    if not half and rows.slot_bytes < 4:
        half = (rows.slots - 1) * counts.groups / counts.sums
    return half + (parts(stage, rows) > 2)


def pieces(stage: Stage, numel: int, ranks: int) -> list[int]:
    """Elements of a range that travel at a time."""
    width = max(1, (BUCKET if stage.layout.overlap else CHUNK) // ranks) * ranks
    return [min(width, numel - start) for start in range(0, numel, width)]


def _in_flight(stage: Stage, rows: Rows) -> float:
    """Copies of ranges that are travelling, of the role that needs more. In the backward one is
    landing while the next one flies (`exchange.py`).

    That a tied embedding travels by itself without the distributed optimizer (`units.py`) is left
    out: a smaller range.
    """
    counts, layout = rows.of(stage.layout), stage.layout
    each = layout.gradient_bytes
    general = [(counts.groups, each)] + [(counts.groups, rows.slot_bytes)] * (rows.slots - 1)
    target = [(counts.halves, each)] * counts.targets
    most = 0.0
    for role in (target, general):
        flights = [
            tuple(size * n for n in _flight(stage, numel, len(b.group), classes, role is target))
            for classes, size in role
            for b, numel in stage.ready
        ]
        most = max([most, *(landing for _, landing in flights)])
        if layout.overlap:
            most = max([most, *(one[1] + other[0] for one, other in pairwise(flights))])
    return most


def _flight(
    stage: Stage, numel: int, ranks: int, classes: int, target: bool
) -> tuple[float, float]:
    """Elements beside a buffer of a range that has been launched, and that lands (`route.py`).

    Between D classes the range itself is sent, and D slices are received; a piece of it is copied,
    as it is not contiguous. Where classes have several ranks, a copy in the order of their shards
    is sent inside a class and R sums are received, E R/D; then these are sent and received. What
    comes of the target at once is its shard, which is not counted here.
    """
    if ranks == 1:
        return 0.0, 0.0
    first, *more = pieces(stage, numel, ranks)
    sums = first * classes / ranks
    copied = first if more or 1 < classes < ranks else 0
    between = 2 * sums if 1 < classes < ranks else 0.0
    shard = sums if target and not more else 0.0
    return copied + sums - shard, max(copied + sums, between) - shard
