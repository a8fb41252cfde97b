"""The ranges of Megatron's gradient buffers that are exchanged together, and what lies in them.

Without the distributed optimizer buckets are not padded to a multiple of the D ranks: what is left
over, fewer than D elements, is gathered by all of them.

Legend: D ranks of a group, N elements of a shard.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_dr.mcore import collectives, compat
from megatron_dr.mcore.buffer_rows.buffers import Buffers, Piece
from megatron_dr.mcore.buffer_rows.layout import Layout
from megatron_dr.mcore.buffer_rows.route import Route, routes
from megatron_dr.mcore.compat import Bucket, BucketGroup, Chunk


@dataclass(frozen=True)
class Segment:
    """Neighbouring columns [start, stop) of a shard, of one block and one way of counting."""

    block: int
    count: float
    partial: str
    start: int
    stop: int


@dataclass
class Unit:
    """A range of one of Megatron's buffers that is exchanged together: D x N elements.

    Attributes:
        group: the D ranks.
        general, target: how each role's buffers travel to the shards' owners.
        scale: what Megatron multiplies a summed gradient of this range by.
        segments: of this rank's shard.
        remainder: it has no shards, it is all on every rank and counts on the first.
        buffers: where its elements are.
        held: of each local buffer that has travelled, every class' sum over this rank's shard
            [R, N]. A general one's lies in the memory that it was sent from.
    """

    buffer: int
    start: int
    columns: int
    group: Any
    general: Route
    target: Route
    scale: float
    segments: list[Segment]
    remainder: bool
    buffers: Buffers
    held: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return len(self.general.members)

    def route(self, row: int) -> Route:
        """Of a local buffer."""
        return self.general if row < self.buffers.row_map.slots else self.target

    def vectors(self, row: int) -> list[int]:
        """Which vectors the classes' sums of a local buffer belong to [R]."""
        return [self.buffers.row_map.vector(key, row) for key in self.route(row).keys]

    def whole(self, row: int) -> torch.Tensor:
        """[D, N], or [1, N] of a remainder: the range of a local buffer."""
        copies = 1 if self.remainder else self.ranks
        flat = self.buffers.flat(row, self.buffer)
        return flat[self.start : self.start + copies * self.columns].view(copies, -1)

    def out(self) -> torch.Tensor:
        """[N]: where this rank's shard of the reduced gradient belongs."""
        return self.whole(0)[0 if self.remainder else dist.get_rank(self.group)]


def units_of(model: list[Chunk], buffers: Buffers, layout: Layout) -> dict[int, list[Unit]]:
    """Every range of every bucket, by the id of Megatron's bucket group (collective)."""
    by_group = {id(_ranks(group)): _ranks(group) for group in compat.bucket_groups(model)}
    wanted = []
    for ranks in by_group.values():
        row_groups = collectives.of_all_ranks(layout.group, ranks)
        by_domain, halves = layout.row_map.by_domain, layout.row_map.halves == "groups"
        wanted.append((ranks, [0 if by_domain else group for group in row_groups]))
        wanted.append((ranks, [group % 2 if halves else 0 for group in row_groups]))
    found = routes(wanted, buffers.device)
    both = dict(zip(by_group, zip(found[::2], found[1::2], strict=True), strict=True))
    return {
        id(group): [
            unit
            for bucket in group.buckets
            for unit in _units(bucket, group, buffers, layout, both[id(_ranks(group))])
        ]
        for group in compat.bucket_groups(model)
    }


def _ranks(group: BucketGroup) -> collectives.Group:
    """The ranks over which a bucket group is reduced."""
    if group.ddp_config.use_distributed_optimizer:
        return group.intra_distributed_optimizer_instance_group
    return group.data_parallel_group


def _units(
    bucket: Bucket, group: BucketGroup, buffers: Buffers, layout: Layout,
    both: tuple[Route, Route],
) -> Iterator[Unit]:  # fmt: skip
    """A bucket's ranges. The distributed optimizer's shards are its own: one range."""
    ddp, peers, ranks = group.ddp_config, _ranks(group), len(both[0].members)
    inside = {id(p) for p in bucket.params_list}
    pieces = [p for p in buffers.pieces if id(buffers.owned[p.number].parameter) in inside]
    pieces.sort(key=lambda p: p.start)
    begin, end = bucket.offset, bucket.offset + bucket.grad_data.numel()
    cuts = [begin, end]
    if not ddp.use_distributed_optimizer:  # a tied embedding's shards are alike on both stages
        tied = [p for p in pieces if buffers.owned[p.number].partial == "embedding"]
        cuts = sorted({begin, end, *(x for p in tied for x in (p.start, p.stop))})
    scale = bucket.gradient_scaling_factor / (ranks if ddp.average_in_collective else 1)
    for start, stop in itertools.pairwise(cuts):
        columns, left = divmod(stop - start, ranks)
        shard, rest = start + dist.get_rank(peers) * columns, stop - left
        parts = ((start, columns, shard, False), (rest, left, rest, True))
        for first, size, low, remainder in parts:
            if size:
                segments = _segments(pieces, buffers, layout, low, low + size)
                yield Unit(pieces[0].buffer, first, size, peers, *both, scale, segments, remainder,
                           buffers)  # fmt: skip


def _segments(
    pieces: list[Piece], buffers: Buffers, layout: Layout, low: int, high: int
) -> list[Segment]:
    """What lies in [low, high) of a buffer, in columns from `low`; like neighbours joined."""
    out: list[Segment] = []
    for piece in pieces:
        start, stop = max(piece.start, low) - low, min(piece.stop, high) - low
        if start >= stop:
            continue
        owned, block = buffers.owned[piece.number], layout.blocks[piece.number]
        out.append(Segment(block, owned.count, owned.partial, start, stop))
    return _joined(out)


def by_block(segments: list[Segment]) -> list[Segment]:
    """Neighbours of one block joined, however they count."""
    return _joined([replace(s, count=1.0, partial="") for s in segments])


def _joined(segments: list[Segment]) -> list[Segment]:
    alike = itertools.groupby(segments, lambda s: (s.block, s.count, s.partial))
    runs = (list(run) for _, run in alike)
    return [replace(run[0], stop=run[-1].stop) for run in runs]
