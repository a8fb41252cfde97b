"""Seconds of a step in which a GPU waits for gradients, by a simple model.

    Buckets become ready evenly over the last backward of their stage.
    A level of links carries one collective at a time; a collective that uses both holds both.
    What is not done when the last backward of the first stage ends is exposed; a stage s ends its
    own s backwards earlier (1F1B), of a chunk each with vpp.
    The target must have left a chunk's buffers when the chunk's first general backward begins, a
    forward after its last target backward. Who waits there makes the stages before it wait too.
    After the general backward: the grams' all-reduce, the solve, the weighted sum of what lies in
    memory.

Left out, being the same in both: the optimizer, its all-gather of parameters, activations'
collectives; and the target's own forwards and backwards, which are computation. What the side
stream does is taken to cost the backward nothing.
"""

import math
from collections import deque
from dataclasses import dataclass

from megatron_dr.plan import memory, reads, wire
from megatron_dr.plan.buffers import Buffer, Stage, stages
from megatron_dr.plan.hardware import Hardware
from megatron_dr.plan.layout import Layout
from megatron_dr.plan.model import Model, parameters
from megatron_dr.plan.rows import Rows
from megatron_dr.plan.wire import Send

_FLYING = 2  # `exchange.py`


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
    last = max(each, key=lambda parts: sum(parts.values()))
    if rows is None or not rows.exact:
        return last
    return last | {"target": _target(model, layout, hardware, batch, rows)}


def _of_stage(
    stage: Stage, hardware: Hardware, batch: Batch, rows: Rows | None
) -> dict[str, float]:
    layout = stage.layout
    if rows is not None and not rows.exact:
        return _sketched(stage, hardware, rows)
    last = backward(stage, hardware, batch)
    end = last * (1 + stage.number / layout.vpp)
    if rows is None:
        done = _plain(stage, hardware, last)
        return {"gradients": max(0.0, done - end)}
    done = _general(stage, hardware, rows, last, 1.5 * last * batch.microbatches / rows.slots)
    return {"gradients": max(0.0, done - end), **_after(stage, hardware, rows)}


def _plain(stage: Stage, hardware: Hardware, last: float) -> float:
    """When the last reduction is done."""
    links = _Links(hardware)
    found = [
        links.carry(wire.reduction(stage.layout, buffer, numel), ready)
        for ready, buffer, numel in _ready(stage, last)
    ]
    return max([last, *found])


def _general(stage: Stage, hardware: Hardware, rows: Rows, last: float, slot: float) -> float:
    """When every slot's rows have travelled and been multiplied.

    Args:
        slot: seconds of the microbatches of one.
    """
    layout, exchange = stage.layout, _Exchange(hardware, stage.layout.overlap)
    for number in range(rows.slots):
        before = (rows.slots - 1 - number) * slot if layout.overlap else 0.0
        for ready, buffer, numel in _ready(stage, last):
            sends = [
                send
                for piece in memory.pieces(stage, numel, len(buffer.group))
                for send in wire.general(layout, rows, buffer, piece, number)
            ]
            put = 2 * rows.of(layout).groups * numel / len(buffer.group) * layout.gradient_bytes
            work = put / hardware.memory_bandwidth
            if number == rows.slots - 1:
                work += _products(stage, hardware, rows, numel / len(buffer.group))
            exchange.launch(ready - before, sends, work)
    return exchange.finish(last)


def _target(model: Model, layout: Layout, hardware: Hardware, batch: Batch, rows: Rows) -> float:
    """Seconds by which the target delays the general backwards: one after another, stages from
    the last to the first."""
    lost = 0.0
    for chunk in reversed(range(layout.vpp)):
        for stage in reversed(stages(model, layout)):
            last = backward(stage, hardware, batch) / layout.vpp
            begin = last * 1.5 + lost
            exchange = _Exchange(hardware, layout.overlap)
            for ready, buffer, numel in _ready(stage, last, chunk):
                sends = [
                    send
                    for piece in memory.pieces(stage, numel, len(buffer.group))
                    for send in wire.target(layout, rows, buffer, piece)
                ]
                exchange.launch(ready if layout.overlap else begin, sends, 0.0)
            lost += max(0.0, exchange.finish(begin) - begin)
    return lost


def _ready(stage: Stage, last: float, chunk: int | None = None) -> list[tuple[float, Buffer, int]]:
    """Buckets of a stage, or of one of its chunks, and when: in a backward of so many seconds."""
    order = [(b, numel) for b, numel in stage.ready if chunk in (None, b.chunk)]
    each = last / max(1, len(order))
    overlap = stage.layout.overlap
    return [((k + 1) * each if overlap else last, b, n) for k, (b, n) in enumerate(order)]


class _Links:
    """Inside a node, and between nodes."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware, self.free = hardware, [-math.inf, -math.inf]

    def carry(self, send: Send, ready: float) -> float:
        """When a collective is done."""
        busy = self.hardware.seconds(send)
        used = [level for level in (0, 1) if busy[level]]
        start = max([ready, *(self.free[level] for level in used)])
        for level in used:
            self.free[level] = start + busy[level]
        return start + max(busy)


class _Exchange:
    """The side stream of `exchange.py`: a bucket's collective leaves when it is ready, and what has
    come is put in place and multiplied before the next but one leaves, or at the end. A bucket of
    several collectives (pieces, the hops of rows of ranks) keeps the stream until it is there."""

    def __init__(self, hardware: Hardware, overlap: bool) -> None:
        self.links, self.most, self.free = _Links(hardware), _FLYING if overlap else 1, -math.inf
        self.flying: deque[tuple[float, list[Send], float]] = deque()

    def launch(self, ready: float, sends: list[Send], work: float) -> None:
        """A bucket is ready; once it is here, it is `work` seconds of the stream."""
        if not sends:
            return
        while len(self.flying) >= self.most:
            self._land(ready)
        first, *rest = sends
        self.flying.append((self.links.carry(first, max(ready, self.free)), rest, work))
        while rest and self.flying:
            self._land(ready)

    def finish(self, now: float) -> float:
        """When all is here."""
        while self.flying:
            self._land(now)
        return max(now, self.free)

    def _land(self, now: float) -> None:
        done, rest, work = self.flying.popleft()
        self.free = max(self.free, now, done)
        for send in rest:
            self.free = self.links.carry(send, self.free)
        self.free += work


def _products(stage: Stage, hardware: Hardware, rows: Rows, columns: float) -> float:
    """Of every vector over some columns of a shard (`exact_gram.py`, _multiply)."""
    moved = reads.products(stage, rows).now * columns
    operations = 2 * rows.of(stage.layout).sums ** 2 * columns
    return moved / hardware.memory_bandwidth + operations / hardware.fp32


def _after(stage: Stage, hardware: Hardware, rows: Rows) -> dict[str, float]:
    """What an exact gram does when every bucket is there (`exact_gram.py`)."""
    moved = sum(b.shard for b in stage.buffers) * reads.summed(stage, rows).now
    return {
        "grams": hardware.alone(wire.grams(stage, rows)),
        "solve": hardware.solve,
        "sum": moved / hardware.memory_bandwidth + hardware.alone(wire.gathered(stage)),
    }


def _sketched(stage: Stage, hardware: Hardware, rows: Rows) -> dict[str, float]:
    """Nothing travels before the backward is over (`sketched_gram.py`)."""
    numel, bandwidth = sum(b.numel for b in stage.buffers), hardware.memory_bandwidth
    made = reads.sketched(stage, rows).now * numel / bandwidth
    stock = [wire.reduction(stage.layout, b, n) for b, n in stage.ready]
    return {
        "gradients": hardware.alone(stock),
        "grams": made + hardware.alone(wire.grams(stage, rows)),
        "solve": hardware.solve,
        "sum": reads.combined(stage, rows).now * numel / bandwidth,
    }
