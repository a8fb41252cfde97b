"""What a rank of a pipeline stage holds: Megatron's gradient buffers, and their buckets."""

import functools
import itertools
import math
from dataclasses import dataclass
from functools import cached_property

from megatron_dr.plan.layout import Layout, Ranks
from megatron_dr.plan.model import Model, Parameter, parameters


@dataclass(frozen=True)
class Buffer:
    """Of one model chunk, dense or of experts.

    Attributes:
        parameters: in the order in which they lie: the last layer first.
        starts: where each begins.
        buckets: elements of each, with padding.
        group: the D ranks over which it is reduced.
    """

    chunk: int
    parameters: tuple[Parameter, ...]
    starts: tuple[int, ...]
    buckets: tuple[int, ...]
    group: Ranks

    @property
    def numel(self) -> int:
        return sum(self.buckets)

    @property
    def filled(self) -> int:
        return sum(p.numel for p in self.parameters)

    @property
    def shard(self) -> float:
        return self.numel / len(self.group)

    def partial(self, kind: str) -> int:
        """Elements whose gradients are partial sums over these ranks."""
        return sum(p.numel for p in self.parameters if p.partial == kind)

    def joined(self, kind: str) -> int:
        """Of these, with the padding between neighbours in one shard: a segment of `units.py`."""
        ends = list(itertools.accumulate(self.buckets, initial=0))
        edges = {
            start + k * (stop - start) // len(self.group)
            for start, stop in itertools.pairwise(ends)
            for k in range(len(self.group) + 1)
        }
        padding = 0
        for (one, start), (other, stop) in itertools.pairwise(
            zip(self.parameters, self.starts, strict=True)
        ):
            gap = range(start + one.numel, stop)
            if one.partial == other.partial == kind and edges.isdisjoint([*gap, stop]):
                padding += len(gap)
        return self.partial(kind) + padding


@dataclass(frozen=True)
class Stage:
    """One of a layout's pipeline stages."""

    model: Model
    layout: Layout
    number: int

    @cached_property
    def buffers(self) -> list[Buffer]:
        """Of all chunks (`core/distributed/param_and_grad_buffer.py`, group_params_for_buffers)."""
        out, layout = [], self.layout
        for chunk, held in enumerate(parameters(self.model, layout, self.number)):
            cut = self._bucket_size(chunk)
            for expert in (False, True):
                inside = tuple(p for p in reversed(held) if p.expert == expert)
                group = (layout.expert_group if expert else layout.data_group)(self.number)
                if inside:
                    starts, buckets = _laid_out(inside, layout, group, cut)
                    out.append(Buffer(chunk, inside, starts, buckets, group))
        return out

    @cached_property
    def ready(self) -> list[tuple[Buffer, int]]:
        """Buckets as they become ready: the last chunk's first, dense and experts' side by side."""
        places = [
            (-b.chunk, (k + 1) / len(b.buckets), b, numel)
            for b in self.buffers
            for k, numel in enumerate(b.buckets)
        ]
        return [(b, numel) for *_, b, numel in sorted(places, key=lambda place: place[:2])]

    def _bucket_size(self, chunk: int) -> float:
        """Stages and chunks after the first have one bucket, as their reduction is not on the
        critical path (`training/training.py`, wrap_model_chunks_with_ddp's callers)."""
        if not self.layout.overlap or self.number or chunk:
            return math.inf
        return self.layout.bucket or max(40_000_000, 1_000_000 * self.layout.data)


@functools.lru_cache(maxsize=8)
def stages(model: Model, layout: Layout) -> tuple[Stage, ...]:
    """Of a layout. Kept, as each has its buffers worked out once."""
    return tuple(Stage(model, layout, number) for number in range(layout.pp))


def _laid_out(
    held: tuple[Parameter, ...], layout: Layout, group: Ranks, cut: float
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Starts, and buckets (`core/optimizer/distrib_optimizer.py`, _compute_per_buffer_param_layout;
    without the distributed optimizer, _compute_default_per_buffer_param_layout)."""
    start_at = 64 if layout.distributed_optimizer else 1
    end_at = math.lcm(len(group), 128) if layout.distributed_optimizer else 1
    starts: list[int] = []
    buckets: list[int] = []
    filled = 0  # of the last bucket, which is not yet among them

    def close() -> None:
        nonlocal filled
        buckets.append(-(-filled // end_at) * end_at)
        filled = 0

    for parameter in held:
        filled = -(-filled // start_at) * start_at
        alone = layout.distributed_optimizer and parameter.partial == "embedding"
        if alone and filled:
            close()
        starts.append(sum(buckets) + filled)
        filled += parameter.numel
        if filled >= cut or alone:
            close()
    if filled:
        close()
    return tuple(starts), tuple(buckets)
