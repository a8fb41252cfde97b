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
        group: the D ranks; member i belongs to row group `members[i]`.
        scale: what Megatron multiplies a summed gradient of this range by.
        segments: of this rank's shard.
        buffers: where its elements are.
        gathered: for a remainder, every rank's copy of it per local buffer [D, N]; a remainder has
            no shards, it is all on every rank and counts on the first.
    """

    buffer: int
    start: int
    columns: int
    group: Any
    members: torch.Tensor
    scale: float
    segments: list[Segment]
    remainder: bool
    buffers: Buffers
    gathered: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return len(self.members)

    def whole(self, row: int) -> torch.Tensor:
        """[D N], or [N] of a remainder: the range of a local buffer."""
        length = self.columns * (1 if self.remainder else self.ranks)
        return self.buffers.flat(row, self.buffer)[self.start : self.start + length]

    def slices(self, row: int) -> torch.Tensor:
        """[D, N]: after the exchange, this rank's shard of every rank's local buffer `row`."""
        return self.gathered[row] if self.remainder else self.whole(row).view(self.ranks, -1)

    def out(self) -> torch.Tensor:
        """[N]: where this rank's shard of the reduced gradient belongs."""
        return self.whole(0) if self.remainder else self.slices(0)[dist.get_rank(self.group)]


def units_of(model: list[Chunk], buffers: Buffers, layout: Layout) -> dict[int, list[Unit]]:
    """Every range of every bucket, by the id of Megatron's bucket group (collective)."""
    out: dict[int, list[Unit]] = {}
    members: dict[int, torch.Tensor] = {}
    for group in compat.bucket_groups(model):
        ranks = _ranks(group)
        if id(ranks) not in members:
            row_groups = collectives.of_all_ranks(layout.group, ranks)
            members[id(ranks)] = torch.tensor(row_groups, device=buffers.device)
        out[id(group)] = [
            unit
            for bucket in group.buckets
            for unit in _units(bucket, group, buffers, layout, members[id(ranks)])
        ]
    return out


def _ranks(group: BucketGroup) -> collectives.Group:
    """The ranks over which a bucket group is reduced."""
    if group.ddp_config.use_distributed_optimizer:
        return group.intra_distributed_optimizer_instance_group
    return group.data_parallel_group


def _units(
    bucket: Bucket, group: BucketGroup, buffers: Buffers, layout: Layout, members: torch.Tensor
) -> Iterator[Unit]:
    """A bucket's ranges. The distributed optimizer's shards are its own: one range."""
    ddp, peers, ranks = group.ddp_config, _ranks(group), len(members)
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
                yield Unit(pieces[0].buffer, first, size, peers, members, scale, segments,
                           remainder, buffers=buffers)  # fmt: skip


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
