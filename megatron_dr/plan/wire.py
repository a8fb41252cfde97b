"""What a rank sends in a step: gradients, parameters, and what the plugin adds.

Activations, whose traffic is not the plugin's, are left out; so are scalars (token counts, the
gradient's norm). All ranks of a stage are taken to send their mean.

Legend: B blocks, R vectors and P sums of `rows.py`, K sketch size, D ranks of a group.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_dr.plan.buffers import Buffer, Stage
from megatron_dr.plan.layout import Layout, Place, Ranks
from megatron_dr.plan.rows import Rows


@dataclass(frozen=True)
class Send:
    """A collective, priced by the algorithms that move least (`megatron_dr/mcore/collectives.py`).

    Attributes:
        part: what it is for.
        kind: `ring` (reduce-scatter or all-gather), `reduce` (all-reduce: both), `exchange`
            (all-to-all).
        payload: bytes of the whole buffer.
    """

    part: str
    kind: Literal["ring", "reduce", "exchange"]
    payload: float
    group: Ranks

    @property
    def bytes(self) -> float:
        """What one rank sends."""
        n = len(self.group)
        return (2 if self.kind == "reduce" else 1) * (n - 1) / n * self.payload

    def outside(self, place: Place) -> float:
        """Of these, what leaves the rank's place.

        A ring enters every place once, and its ranks share that (one of several rings each). In an
        all-to-all every pair of ranks has its own part.
        """
        places = [place(rank) for rank in self.group]
        if self.kind == "exchange":
            return self.payload * sum(p != places[0] for p in places) / len(places)
        number = len(set(places))
        return self.bytes * number / len(places) if number > 1 else 0.0


def by_level(sends: list[Send], place: Place) -> tuple[float, float]:
    """Bytes that stay inside a rank's place, and that leave it."""
    outside = sum(send.outside(place) for send in sends)
    return sum(send.bytes for send in sends) - outside, outside


def plain(stage: Stage) -> list[Send]:
    """Of Megatron-Core (`core/distributed/param_and_grad_buffer.py`, start_grad_sync and
    start_param_sync; `core/distributed/finalize_model_grads.py`)."""
    return [*(reduction(stage.layout, b, b.numel) for b in stage.buffers), *_shared(stage)]


def ours(stage: Stage, rows: Rows) -> list[Send]:
    """With the plugin (`megatron_dr/mcore/buffer_rows/`: exact_gram.py, sketched_gram.py)."""
    if not rows.exact:
        return [*plain(stage), *grams(stage, rows)]
    out = [*_shared(stage), *grams(stage, rows), *gathered(stage)]
    for buffer in stage.buffers:
        for slot in range(rows.slots):
            out += general(stage.layout, rows, buffer, buffer.numel, slot)
        out += target(stage.layout, rows, buffer, buffer.numel)
    return out


def reduction(layout: Layout, buffer: Buffer, numel: int) -> Send:
    """Megatron's own, of a bucket."""
    kind: Literal["ring", "reduce"] = "ring" if layout.distributed_optimizer else "reduce"
    return Send("gradients", kind, numel * layout.gradient_bytes, buffer.group)


def _shared(stage: Stage) -> Iterator[Send]:
    """What is sent with the plugin and without: parameters, and gradients that are partial sums
    over tensor ranks (norms) or the ends of the pipeline (a tied embedding)."""
    layout = stage.layout
    # the dense and the experts' optimizer gather both buffers each (`core/optimizer/
    # distrib_optimizer.py`, step_with_ready_grads); the forward's hooks gather a buffer once
    optimizers = len({b.parameters[0].expert for b in stage.buffers})
    times = 1 if layout.overlap_gather else optimizers
    for buffer in stage.buffers:
        if layout.distributed_optimizer:
            numel = times * buffer.numel
            yield Send("parameters", "ring", numel * layout.weight_bytes, buffer.group)
        for kind, group in _partial_groups(stage):
            if buffer.partial(kind):
                yield Send("partial", "reduce", buffer.partial(kind) * layout.gradient_bytes, group)


def _partial_groups(stage: Stage) -> tuple[tuple[str, Ranks], ...]:
    layout = stage.layout
    return ("tensor", layout.tensor_group(stage.number)), ("embedding", layout.embedding_group())


def general(layout: Layout, rows: Rows, buffer: Buffer, numel: int, slot: int) -> list[Send]:
    """A bucket of a slot (`route.py`): a reduce-scatter inside each row, then an all-to-all of what
    is left between the rows."""
    if slot:
        return _route("slots", numel * rows.slot_bytes, buffer.group, rows.place(layout))
    return _route("gradients", numel * layout.gradient_bytes, buffer.group, rows.place(layout))


def target(layout: Layout, rows: Rows, buffer: Buffer, numel: int) -> list[Send]:
    """A bucket of the target's: summed, or its halves."""
    counts, place = rows.of(layout), rows.place(layout)
    payload = numel * layout.gradient_bytes
    one = _route("target", payload, buffer.group, lambda rank: place(rank) % counts.halves)
    return one * counts.targets


def _route(part: str, payload: float, group: Ranks, key: Place) -> list[Send]:
    classes: dict[int, list[int]] = {}
    for rank in group:
        classes.setdefault(key(rank), []).append(rank)
    inner, *_ = classes.values()
    across = tuple(ranks[0] for ranks in classes.values())
    inside = Send(part, "ring", payload, tuple(inner))
    between = Send(part, "exchange", payload / len(inner), across)
    return [send for send in (inside, between) if len(send.group) > 1]


def gathered(stage: Stage) -> list[Send]:
    """Without the distributed optimizer every rank gets the whole result (`exact_gram.py`,
    _finish): the other half of Megatron's all-reduce."""
    layout, held = stage.layout, stage.buffers
    if layout.distributed_optimizer:
        return []
    return [Send("gradients", "ring", b.numel * layout.gradient_bytes, b.group) for b in held]


def grams(stage: Stage, rows: Rows) -> list[Send]:
    """Products, and the rows of partial gradients that are summed before (`exact_gram.py`); or the
    sketches and their products (`sketched_gram.py`)."""
    layout, counts = stage.layout, rows.of(stage.layout)
    data, model = layout.data_group(stage.number), layout.model_group()
    products = 8 * rows.blocks * counts.vectors
    if not rows.exact:
        block = 4 * (rows.slots + counts.targets) * rows.sketch
        each = math.ceil(rows.blocks / len(model))  # blocks of a rank: one is not divided
        return [
            Send("grams", "reduce", rows.blocks * block, model),
            Send("grams", "ring", each * block * len(data), data),
            Send("grams", "reduce", products * (counts.vectors + 2), model),
        ]
    partial = [
        Send("grams", "reduce", 4 * counts.sums * buffer.joined(kind) / len(buffer.group), group)
        for buffer in stage.buffers
        for kind, group in _partial_groups(stage)
        if buffer.partial(kind)
    ]
    return partial + [
        Send("grams", "reduce", products * (counts.vectors + 1), group) for group in (data, model)
    ]
