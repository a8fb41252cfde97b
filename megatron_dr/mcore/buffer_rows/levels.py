"""What a rank sends by level, inside its node and between nodes, and the seconds that it takes.

A reduction or a gathering of n ranks on N nodes sends (n - 1)/n of the bytes, and of a ring's or a
tree's traffic each byte crosses between two nodes once for a node: a rank's share of it is
(N - 1)/N of the bytes over its n/N peers on the node. An all-to-all sends to each rank what is its.
"""

import os
from dataclasses import dataclass

import torch.distributed as dist

from megatron_dr.mcore.collectives import Group

# bytes a second that a GPU sends, one way: of an H100's NVLink 4 (450 GB/s by data sheet) and of
# a 400 Gb/s card for each GPU (50), less what collectives don't reach. Their ratio is what counts.
INSIDE, BETWEEN = 350e9, 45e9


@dataclass(frozen=True)
class Sent:
    """Bytes to ranks of the node, and to other nodes."""

    inside: float = 0.0
    between: float = 0.0

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(self.inside + other.inside, self.between + other.between)

    @property
    def seconds(self) -> float:
        """One after the other, at the bandwidths above; latencies don't count."""
        return self.inside / INSIDE + self.between / BETWEEN


def node_of(rank: int) -> int:
    """By the number of ranks on a node, as torchrun and Slurm say; where nothing does, 1."""
    each = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
    return rank // int(each)


def reduced(num_bytes: float, group: Group) -> Sent:
    """A reduce-scatter of so many bytes, or an all-gather to so many; an all-reduce is both."""
    nodes = _nodes(group)
    ranks, number = len(nodes), len(set(nodes))
    between = (number - 1) * num_bytes / ranks
    return Sent((ranks - 1) * num_bytes / ranks - between, between)


def all_reduced(num_bytes: float, group: Group) -> Sent:
    return reduced(num_bytes, group) + reduced(num_bytes, group)


def exchanged(num_bytes: float, group: Group) -> Sent:
    """An all-to-all of so many bytes."""
    nodes = _nodes(group)
    here = nodes.count(node_of(dist.get_rank()))
    between = (len(nodes) - here) * num_bytes / len(nodes)
    return Sent((here - 1) * num_bytes / len(nodes), between)


def _nodes(group: Group) -> list[int]:
    """Of each rank; of no group this rank's alone."""
    ranks = [dist.get_rank()] if group is None else dist.get_process_group_ranks(group)
    return [node_of(rank) for rank in ranks]
