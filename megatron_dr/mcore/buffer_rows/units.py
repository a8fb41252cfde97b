"""The ranges of Megatron's gradient buffers that are exchanged together, and what lies in them.

Without the distributed optimizer buckets are not padded to a multiple of the D ranks: what is left
over, fewer than D elements, is gathered by all of them.

With I instances of it, an instance's D/I ranks share a bucket, and a rank's shard here is one of I
parts of its shard there: what the parts of the other instances became, it gets from them at the end
(`spread`), so that reduction and gathering send together what Megatron's reduce-scatter and the
all-reduce between instances do, (D - 1)/D of a bucket.

Legend: D ranks of a group, N elements of a shard.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from megatron_dr.mcore import collectives, compat, progress
from megatron_dr.mcore.buffer_rows import levels
from megatron_dr.mcore.buffer_rows.buffers import Buffers, Piece
from megatron_dr.mcore.buffer_rows.layout import Layout
from megatron_dr.mcore.buffer_rows.levels import Sent
from megatron_dr.mcore.buffer_rows.route import Route, Wanted, routes
from megatron_dr.mcore.compat import Bucket, BucketGroup, Chunk, Peers


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
        peers: the D ranks, and which of them have a shard of the optimizer's.
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
    peers: Peers
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

    @property
    def first(self) -> bool:
        """Whether this is the first of the ranks."""
        return dist.get_rank(self.peers.all) == 0

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
        return self.whole(0)[0 if self.remainder else self.general.place]

    def spread(self, everywhere: bool) -> None:
        """What was reduced comes to all ranks with the optimizer's shard.

        Args:
            everywhere: to all ranks.
        """
        if self.remainder or self.ranks == 1:
            return
        instance, copies = self.peers.instance, self.peers.copies
        shards = self.whole(0).view(dist.get_world_size(instance), -1)
        own = shards[dist.get_rank(instance)]
        if copies is not None:
            with progress.waiting(progress.begun(copies)):
                dist.all_gather_into_tensor(own, self.out().clone(), group=copies)
        if everywhere:
            with progress.waiting(progress.begun(instance)):
                dist.all_gather_into_tensor(shards.view(-1), own.clone(), group=instance)

    def sent(self, row: int, num_bytes: int) -> Sent:
        """What a rank sends of a local buffer.

        Args:
            num_bytes: of an element.
        """
        whole = num_bytes * self.columns * self.ranks
        return (
            levels.reduced(whole, self.peers.all) if self.remainder else self.route(row).sent(whole)
        )

    def spread_sent(self, num_bytes: int, everywhere: bool) -> Sent:
        """What a rank sends in `spread`."""
        if self.remainder:
            return Sent()
        whole, instance = num_bytes * self.columns * self.ranks, self.peers.instance
        shared = levels.reduced(whole / dist.get_world_size(instance), self.peers.copies)
        return shared + levels.reduced(whole, instance) if everywhere else shared


def units_of(model: list[Chunk], buffers: Buffers, layout: Layout) -> dict[int, list[Unit]]:
    """Every range of every bucket, by the id of Megatron's bucket group (collective)."""
    by_group = {id(ranks.all): ranks for ranks in map(compat.peers, compat.bucket_groups(model))}
    wanted = []
    for ranks in by_group.values():
        row_groups = collectives.of_all_ranks(layout.group, ranks.all)
        by_domain, halves = layout.row_map.by_domain, layout.row_map.halves == "groups"
        size = dist.get_world_size(ranks.instance)
        wanted.append(Wanted(ranks.all, [0 if by_domain else group for group in row_groups], size))
        wanted.append(Wanted(ranks.all, [group % 2 if halves else 0 for group in row_groups], size))
    known = [ranks for some in by_group.values() for ranks in some if ranks is not None]
    found = routes(wanted, known, buffers.device)
    both = dict(zip(by_group, zip(found[::2], found[1::2], strict=True), strict=True))
    return {
        id(group): [
            unit
            for bucket in group.buckets
            for unit in _units(bucket, group, buffers, layout, both[id(compat.peers(group).all)])
        ]
        for group in compat.bucket_groups(model)
    }


def _units(
    bucket: Bucket, group: BucketGroup, buffers: Buffers, layout: Layout,
    both: tuple[Route, Route],
) -> Iterator[Unit]:  # fmt: skip
    """A bucket's ranges. The distributed optimizer's shards are its own: one range.

    Raises:
        ValueError: instances of the distributed optimizer can't share its shards evenly.
    """
    ddp, peers, ranks = group.ddp_config, compat.peers(group), len(both[0].members)
    inside = {id(p) for p in bucket.params_list}
    pieces = [p for p in buffers.pieces if id(buffers.owned[p.number].parameter) in inside]
    pieces.sort(key=lambda p: p.start)
    begin, end = bucket.offset, bucket.offset + bucket.grad_data.numel()
    if peers.copies is not None and (end - begin) % ranks:
        raise ValueError(
            f"--num-distributed-optimizer-instances {dist.get_world_size(peers.copies)}: exact "
            f"rows cut a bucket of {end - begin:,} elements into {ranks} equal parts, one for each "
            "data rank: add --ddp-pad-buckets-for-high-nccl-busbw, or take --dr-gram sketch."
        )
    cuts = [begin, end]
    if not ddp.use_distributed_optimizer:  # a tied embedding's shards are alike on both stages
        tied = [p for p in pieces if buffers.owned[p.number].partial == "embedding"]
        cuts = sorted({begin, end, *(x for p in tied for x in (p.start, p.stop))})
    scale = bucket.gradient_scaling_factor / (ranks if ddp.average_in_collective else 1)
    for start, stop in itertools.pairwise(cuts):
        columns, left = divmod(stop - start, ranks)
        shard, rest = start + both[0].place * columns, stop - left
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
