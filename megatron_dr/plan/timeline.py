"""Seconds of a step in which a GPU waits for gradients, by a simple model.

    Buckets become ready evenly over the last backward of their stage.
    A level of links carries one collective at a time; a collective that uses both holds both.
    What is not done when the last backward of the first stage ends is exposed; a stage s ends its
    own s backwards earlier (1F1B), of a chunk each with vpp.
    The target's buckets must be done when the first general backward begins, a forward later.
    With the plugin at most two buckets travel at a time: the backward waits for them.
    Then: the grams' all-reduce, the solve, the weighted sum of what lies in memory.

Left out, being the same in both: the optimizer, its all-gather of parameters, activations'
collectives. The kernels of the side stream are taken to cost the backward nothing.
"""

import math
from dataclasses import dataclass

from megatron_dr.plan import wire
from megatron_dr.plan.buffers import Stage, stages
from megatron_dr.plan.hardware import Hardware
from megatron_dr.plan.layout import Layout
from megatron_dr.plan.model import Model, parameters
from megatron_dr.plan.rows import Rows
from megatron_dr.plan.wire import Send

_FLYING = 2  # `exchange.py`
Events = list[tuple[float, list[Send]]]  # when it is ready, and one after the other


@dataclass(frozen=True)
class Batch:
    """Tokens of a microbatch, and general microbatches of a rank and step."""

    tokens: int
    microbatches: int


def backward(stage: Stage, hardware: Hardware, batch: Batch) -> float:
    """Seconds of one microbatch's backward on a stage: 4 FLOPs an element and token; a forward is
    half of it."""
    chunks = parameters(stage.model, stage.layout, stage.number)
    each = sum(p.numel * p.share for held in chunks for p in held)
    return 4 * each * batch.tokens / stage.layout.cp / hardware.flops


def exposed(
    model: Model, layout: Layout, hardware: Hardware, batch: Batch, rows: Rows | None = None
) -> dict[str, float]:
    """By part, on the stage that is done last; plain Megatron where there are no rows."""
    each = [_of_stage(stage, hardware, batch, rows) for stage in stages(model, layout)]
    return max(each, key=lambda parts: sum(parts.values()))


def _of_stage(
    stage: Stage, hardware: Hardware, batch: Batch, rows: Rows | None
) -> dict[str, float]:
    layout, order = stage.layout, stage.ready
    last = backward(stage, hardware, batch)
    end = last * (1 + stage.number / layout.vpp)
    stock = [[wire.reduction(layout, b, n)] for b, n in order]
    if rows is None:
        done = _done(_events(stock, last, layout.overlap), hardware, last)
        return {"gradients": max(0.0, done - end)}
    if not rows.exact:
        return _sketched(stage, hardware, rows, stock)
    events: Events = []
    for slot in range(rows.slots):
        before = (rows.slots - 1 - slot) * batch.microbatches / rows.slots * 1.5 * last
        sends = [wire.general(layout, rows, b, n, slot) for b, n in order]
        events += [(at - before, each) for at, each in _events(sends, last, layout.overlap)]
    targets = [wire.target(layout, rows, b, n) for b, n in order]
    handed = _done(_events(targets, last, layout.overlap), hardware, last)
    done = _done(sorted(events, key=lambda event: event[0]), hardware, last, _FLYING)
    return {
        "gradients": max(0.0, done - end),
        "target": max(0.0, handed - last * (1.5 if layout.overlap else 1.0)),
        **_after(stage, hardware, rows),
    }


def _events(sends: list[list[Send]], last: float, overlap: bool) -> Events:
    number = len(sends)
    return [(last * (k + 1) / number if overlap else last, each) for k, each in enumerate(sends)]


def _done(events: Events, hardware: Hardware, last: float, most: int = 0) -> float:
    """When backward and collectives are over; at most so many events travel at a time."""
    ends: list[float] = []
    free, late = [-math.inf, -math.inf], 0.0
    for ready, sends in events:
        now = ready + late
        if most and len(ends) >= most and ends[-most] > now:
            late, now = late + ends[-most] - now, ends[-most]
        for send in sends:
            busy = hardware.seconds(send)
            start = max([now, *(free[level] for level in (0, 1) if busy[level])])
            for level in (0, 1):
                if busy[level]:
                    free[level] = start + busy[level]
            now = start + max(busy)
        ends.append(now)
    return max([last + late, *ends])


def _after(stage: Stage, hardware: Hardware, rows: Rows) -> dict[str, float]:
    """What an exact gram does when the last bucket is there (`exact_gram.py`)."""
    layout, counts = stage.layout, rows.of(stage.layout)
    shard = sum(b.shard for b in stage.buffers)
    buffer, bucket = stage.ready[-1]
    left = bucket / len(buffer.group) if layout.overlap else shard
    products = counts.sums * left * layout.gradient_bytes / hardware.memory_bandwidth
    products += 2 * counts.sums**2 * left / hardware.doubles
    moved = (rows.slots * counts.groups + 1) * shard * layout.gradient_bytes  # every row's slice
    return {
        "grams": products + hardware.alone(wire.grams(stage, rows)),
        "solve": hardware.solve,
        "sum": moved / hardware.memory_bandwidth,
        "gather": hardware.alone(wire.gathered(stage)),
    }


def _sketched(
    stage: Stage, hardware: Hardware, rows: Rows, stock: list[list[Send]]
) -> dict[str, float]:
    """Nothing travels before the backward is over (`sketched_gram.py`)."""
    local = rows.slots + rows.of(stage.layout).targets
    numel = sum(b.numel for b in stage.buffers)
    read = local * numel * stage.layout.gradient_bytes / hardware.memory_bandwidth
    return {
        "gradients": sum(hardware.alone(each) for each in stock),
        "grams": read + hardware.alone(wire.grams(stage, rows)),
        "solve": hardware.solve,
        "sum": read,
    }
