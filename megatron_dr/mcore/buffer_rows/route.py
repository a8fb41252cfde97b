"""How a range of a gradient buffer gets to the ranks that own its shards, summed over classes.

The D ranks of a group are R classes of g: one row, or the target's share, each. A rank owns one of
the range's D shards and needs of it every class' sum, [R, N] elements:

    inside a class       reduce-scatter of R shards to each of its g ranks
    between the classes  all-to-all among the ranks of equal place, of what is left, E/g elements

Both together send (D - 1)/D of the range, as a reduce-scatter over all ranks does. With g = 1 the
first falls away, with R = 1 the second, and what is left is a reduce-scatter.

Legend: D ranks of a group, R classes, g ranks of a class, N elements of a shard.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_dr.mcore import collectives
from megatron_dr.mcore.collectives import Group

Steps = Generator[Any, None, torch.Tensor]  # yields each collective's handle, to be waited for


@dataclass(frozen=True)
class Route:
    """One way for all ranges that a group of ranks shares.

    Attributes:
        keys: of the R classes, in order.
        members: each of the D ranks' class, 0 .. R - 1.
        inner: the ranks of this rank's class; None where it is alone.
        across: the ranks of equal place, one of each class; None where there is one class.
        order: shards in the order in which the ranks inside a class get them; None: as they lie.
    """

    keys: tuple[int, ...]
    members: tuple[int, ...]
    inner: Group
    across: Group
    order: torch.Tensor | None

    def steps(self, shards_DN: torch.Tensor, counted: bool) -> Steps:
        """[R, N] of this rank's own shard; of one rank, its own memory.

        Args:
            counted: False where it stands for a reduction of Megatron's that is left out.
        """
        sums_RN = shards_DN
        if self.inner is not None:
            send = shards_DN if self.order is None else shards_DN[self.order]
            sums_RN = send.new_empty(len(self.keys), send.shape[1])
            yield collectives.scattered(sums_RN, send.contiguous(), self.inner, counted)
            del send  # a copy where shards are in another order
        if self.across is not None:
            send, sums_RN = sums_RN.contiguous(), torch.empty_like(sums_RN)
            yield collectives.exchanged(sums_RN, send, self.across, counted)
        return sums_RN

    def summed(self, parts_DN: torch.Tensor) -> torch.Tensor:
        """[R, N] of what every rank has the whole of."""
        out = parts_DN.new_zeros(len(self.keys), parts_DN.shape[1])
        return out.index_add_(0, torch.tensor(self.members, device=out.device), parts_DN)


def routes(wanted: Sequence[tuple[Group, Sequence[int]]], device: torch.device) -> list[Route]:
    """A route for each (group, the class of each of its ranks), (collective, over all ranks).

    Equal classes have equal numbers of ranks, and the ranks of equal place ascend with the class.
    """
    plans = [_plan(dist.get_process_group_ranks(group), keys) for group, keys in wanted]
    made = collectives.new_groups(
        [ranks for inner, across, _ in plans for ranks in (inner, across)],
        [group for group, _ in wanted],
        device,
    )
    out = []
    for (_, keys), (inner, across, order) in zip(wanted, plans, strict=True):
        names = sorted(set(keys))
        two = len(inner) > 1 and len(across) > 1
        out.append(
            Route(
                tuple(names), tuple(names.index(key) for key in keys),
                made.get(tuple(inner)), made.get(tuple(across)),
                torch.tensor(order, device=device) if two else None,
            )
        )  # fmt: skip
    return out


def _plan(ranks: list[int], keys: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """This rank's class, its peers of equal place, and the shards in the order of places."""
    names = sorted(set(keys))
    classes = [[n for n, key in enumerate(keys) if key == name] for name in names]
    by_place = list(zip(*classes, strict=True))
    own = ranks.index(dist.get_rank())
    place = next(place for place in by_place if own in place)
    if any(list(p) != sorted(p) for p in by_place) or ranks != sorted(ranks):
        raise RuntimeError(f"rows {list(keys)} of ranks {ranks} are not in the order of ranks.")
    inner = next(members for members in classes if own in members)
    order = [shard for p in by_place for shard in p]
    return [ranks[n] for n in inner], [ranks[n] for n in place], order
