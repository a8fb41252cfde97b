"""What a rank sends by level, inside its node and between nodes, and the seconds that it takes: by
the plan's arithmetic (`megatron_dr/plan/wire.py`), of process groups.
"""

import os
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from megatron_dr.mcore.collectives import Group
from megatron_dr.plan import wire
from megatron_dr.plan.hardware import H100


@dataclass(frozen=True)
class Sent:
    """Bytes to ranks of the node, and to other nodes."""

    inside: float = 0.0
    between: float = 0.0

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(self.inside + other.inside, self.between + other.between)

    @property
    def seconds(self) -> float:
        """One after the other, at the bandwidths of an H100's links, of which the ratio counts;
        latencies don't."""
        return self.inside / H100.inside.bandwidth + self.between / H100.between.bandwidth


def node_of(rank: int) -> int:
    """By the number of ranks on a node, as torchrun and Slurm say; where nothing does, 1."""
    each = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
    return rank // int(each)


def reduced(num_bytes: float, group: Group) -> Sent:
    """A reduce-scatter of so many bytes, or an all-gather to so many; an all-reduce is both."""
    return _sent("ring", num_bytes, group)


def all_reduced(num_bytes: float, group: Group) -> Sent:
    return _sent("reduce", num_bytes, group)


def exchanged(num_bytes: float, group: Group) -> Sent:
    """An all-to-all of so many bytes."""
    return _sent("exchange", num_bytes, group)


def _sent(kind: Literal["ring", "reduce", "exchange"], num_bytes: float, group: Group) -> Sent:
    """Of no group this rank's alone."""
    own = dist.get_rank()
    ranks = [own] if group is None else dist.get_process_group_ranks(group)
    own_first = tuple(sorted(ranks, key=lambda rank: rank != own))  # whose node counts as inside
    return Sent(*wire.by_level([wire.Send("", kind, num_bytes, own_first)], node_of))
