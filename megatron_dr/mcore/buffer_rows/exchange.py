"""When each bucket's rows travel: as soon as they are ready, in the backward, where Megatron
overlaps its own reduction, and else when the backward is over.

Under every schedule a model chunk's backwards run in the order of its microbatches, so that a local
buffer is complete when its last microbatch's backward has passed. Which bucket is complete then,
Megatron's own bookkeeping tells (`register_grad_ready`, `start_grad_sync`); as there, nothing is
overlapped in the first step, which counts.

The target and slot 0 share Megatron's buffer. What the step needs of the target, its shard of the
sum, has left the buffer and the buffer is zero before the chunk's first general backward begins.

All ranks of a group launch the same collectives in the same order: target, slots, each bucket by
bucket as they become ready, and what is left of them at the end in the order of buckets.
"""

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dr.mcore import collectives, compat, meter
from megatron_dr.mcore.buffer_rows.row_map import RowMap
from megatron_dr.mcore.buffer_rows.units import Unit
from megatron_dr.mcore.compat import BucketGroup, Chunk

# elements of a unit that travel at a time: after the backward, and in it (Megatron's stages after
# the first have one bucket)
_CHUNK, _BUCKET = 1 << 25, 1 << 26
_FLYING = 2  # units that travel at the same time in the backward: what bounds the extra memory

Steps = Generator[Any, None, None]


@dataclass
class _Travel:
    chunk: int
    unit: Unit
    row: int
    steps: Steps
    handle: Any


class Exchange:
    """Of one model.

    Args:
        units: by the id of Megatron's bucket group.
        arrived: called with a unit when all of a step's local buffers of it are here.

    Attributes:
        overlapped: whether buckets travel in the backward. Domain rows don't: a rank's last
            microbatch of a domain is not where another rank's is.
    """

    def __init__(
        self, model: Sequence[Chunk], units: dict[int, list[Unit]], row_map: RowMap,
        device: torch.device, arrived: Callable[[Unit], None],
    ) -> None:  # fmt: skip
        self.units, self.row_map, self._arrived = units, row_map, arrived
        self.groups: list[list[BucketGroup]] = [list(compat.bucket_groups([c])) for c in model]
        ddp = model[0].ddp_config
        self.overlapped = bool(ddp.overlap_grad_reduce) and not row_map.by_domain
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._rows: Sequence[int] = ()  # local buffers of the step
        self._now: dict[int, int] = {}  # the local buffer of a chunk's last backward
        self._begun: set[tuple[int, int]] = set()
        self._flying: deque[_Travel] = deque()

    def all_units(self) -> Iterator[Unit]:
        for units in self.units.values():
            yield from units

    # -- a step ----------------------------------------------------------------------------------
    @contextmanager
    def step(self, rows: Sequence[int]) -> Iterator[None]:
        """Megatron's buckets are launched here inside; an exception leaves them as they were.

        Args:
            rows: the local buffers that the step will fill.
        """
        self._rows = rows
        everyone = [(chunk, group) for chunk, groups in enumerate(self.groups) for group in groups]
        for chunk, group in everyone:
            group.start_grad_sync = functools.partial(self._ready, chunk, group)
        done = False
        try:
            yield
            done = True
        finally:
            for handle in (t.handle for t in self._flying if t.handle is not None):
                with suppress(RuntimeError):  # a peer is gone: what ended the step says more
                    handle.wait()
            self._join()
            self._flying.clear()
            self._begun.clear()
            self._now.clear()
            for unit in self.all_units():
                unit.held.clear()
            for _, group in everyone:
                del group.start_grad_sync
                if not done:
                    group.per_param_grad_ready_counts = {}

    def backward(self, chunk: int, row: int, last: bool) -> None:
        """A microbatch's backward begins on a model chunk.

        Args:
            row: its local buffer.
            last: whether it is the last of that buffer.
        """
        before = self._now.get(chunk, row)
        if before != row and before >= self.row_map.slots:
            self._hand_over(chunk, before)
        self._now[chunk] = row
        if self.overlapped:
            for group in self.groups[chunk]:
                group.is_last_microbatch = last
                group.is_first_batch = not group.golden_per_param_grad_ready_counts
                if last:
                    group.per_param_grad_ready_counts = {}

    @meter.part("exchange")
    def finish(self) -> None:
        """The backward is over: what is left travels, and everything has arrived."""
        for row in self._rows:
            for chunk, groups in enumerate(self.groups):
                for group in groups:
                    self._launch(chunk, group, row)
        while self._flying:
            self._land(self._flying.popleft())
        self._join()

    # -- buckets ---------------------------------------------------------------------------------
    def _ready(self, chunk: int, group: BucketGroup, force_all_reduce: bool = False) -> None:
        """In place of a bucket group's `start_grad_sync`."""
        self._launch(chunk, group, self._now[chunk])

    def _hand_over(self, chunk: int, row: int) -> None:
        """The target's share leaves Megatron's buffers of a chunk."""
        for group in self.groups[chunk]:
            self._launch(chunk, group, row)
        for travel in [t for t in self._flying if t.chunk == chunk and t.row == row]:
            self._flying.remove(travel)
            self._land(travel)
        self._join()

    def _launch(self, chunk: int, group: BucketGroup, row: int) -> None:
        """Once for each local buffer of a bucket group."""
        if (id(group), row) in self._begun:
            return
        self._begun.add((id(group), row))
        for unit in self.units[id(group)]:
            while len(self._flying) >= (_FLYING if self.overlapped else 1):
                self._land(self._flying.popleft())
            with self._aside():
                steps = _steps(unit, row, self.overlapped)
                handle = next(steps, None)
            self._flying.append(_Travel(chunk, unit, row, steps, handle))
            if self._stream is not None and _collectives(unit, row, self.overlapped) > 1:
                # on a stream nothing waits here: pieces and hops follow each other by themselves
                while self._flying:
                    self._land(self._flying.popleft())

    @meter.part("exchange")
    def _land(self, travel: _Travel) -> None:
        with self._aside():
            while travel.handle is not None:
                travel.handle.wait()
                travel.handle = None  # it keeps what has travelled
                travel.handle = next(travel.steps, None)
            if len(travel.unit.held) == len(self._rows):
                self._arrived(travel.unit)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On a stream of its own, after what is on the device's queue now."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def _join(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


def _width(unit: Unit, overlapped: bool) -> int:
    """Columns that travel at a time."""
    return max(1, (_BUCKET if overlapped else _CHUNK) // unit.ranks)


def _collectives(unit: Unit, row: int, overlapped: bool) -> int:
    """That bring a unit's local buffer, one after another."""
    route = unit.route(row)
    hops = len(route.inner) + (route.across is not None)
    return hops * -(-unit.columns // _width(unit, overlapped))


def _steps(unit: Unit, row: int, overlapped: bool) -> Steps:
    """A unit's local buffer travels: yields handles; at the end, `unit.held[row]` is there."""
    route, whole, is_target = unit.route(row), unit.whole(row), row >= unit.buffers.row_map.slots
    if unit.remainder:
        parts_DN = whole.new_empty(unit.ranks, unit.columns)
        yield collectives.gathering(parts_DN, whole, unit.peers.all)
        unit.held[row] = route.summed(parts_DN)
    else:
        width = _width(unit, overlapped)
        whole_at_once, into_RN = width >= unit.columns, whole[: len(route.keys)]
        if is_target and not whole_at_once:  # a shard, in memory of its own
            into_RN = torch.empty_like(into_RN)
        for start in range(0, unit.columns, width):
            columns = slice(start, start + width)
            sums_RN = yield from route.steps(whole[:, columns], counted=row > 0)
            if is_target and whole_at_once:
                into_RN = sums_RN if unit.ranks > 1 else sums_RN.clone()
            elif is_target or unit.ranks > 1:
                into_RN[:, columns] = sums_RN
            del sums_RN  # before the next piece is copied
        unit.held[row] = into_RN
    if is_target:
        whole.zero_()
