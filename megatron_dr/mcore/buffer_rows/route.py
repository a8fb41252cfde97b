"""How a range of a gradient buffer gets to the ranks that own its shards, summed over classes.

The D ranks of a group are R classes of g: one row, or the target's share, each. A rank owns one of
the range's D shards and needs of it every class' sum, [R, N] elements:

    inside a class       reduce-scatter of R shards to each of its g ranks
    between the classes  all-to-all among the ranks of equal place, of what is left, E/g elements

Both together send (D - 1)/D of the range, as a reduce-scatter over all ranks does. With g = 1 the
first falls away, with R = 1 the second, and what is left is a reduce-scatter.

With I instances of the distributed optimizer an instance's D/I ranks have a shard of it each, and
so have those of every other. A rank owns one of its optimizer shard's I parts, and number n of
instance i the part (n, i) of the range: what an instance's class sends lies as it must. A class of
several instances is summed inside each of them first, then among its ranks of equal place, so that
1/(D/I) of the range goes between instances, as in Megatron's own reduction.

Legend: D ranks of a group, R classes, g ranks of a class, N elements of a shard.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_dr.mcore import collectives, constants
from megatron_dr.mcore.buffer_rows import levels
from megatron_dr.mcore.buffer_rows.levels import Sent
from megatron_dr.mcore.collectives import Group

Steps = Generator[Any, None, torch.Tensor]  # yields each collective's handle, to be waited for


@dataclass(frozen=True)
class Route:
    """One way for all ranges that a group of ranks shares.

    Attributes:
        keys: of the R classes, in order.
        members: each of the D ranks' class, 0 .. R - 1.
        place: which of the D shards, as they lie, is this rank's.
        inner: the ranks that each reduce-scatter inside this rank's class is among.
        across: the ranks of equal place, one of each class; None where there is one class.
        order: shards in the order in which the ranks get them; None: as they lie.
    """

    keys: tuple[int, ...]
    members: tuple[int, ...]
    place: int
    inner: tuple[Group, ...]
    across: Group
    order: torch.Tensor | None

    def steps(self, shards_DN: torch.Tensor, counted: bool) -> Steps:
        """[R, N] of this rank's own shard; of one rank, its own memory.

        Args:
            counted: False where it stands for a reduction of Megatron's that is left out.
        """
        sums_XN = shards_DN if self.order is None else shards_DN[self.order]
        for ranks in self.inner:
            send = sums_XN.contiguous()
            sums_XN = send.new_empty(len(send) // dist.get_world_size(ranks), send.shape[1])
            yield collectives.scattered(sums_XN, send, ranks, counted)
            del send  # a copy where shards are in another order
        if self.across is not None:
            send, sums_XN = sums_XN.contiguous(), torch.empty_like(sums_XN)
            yield collectives.exchanged(sums_XN, send, self.across, counted)
        return sums_XN

    def summed(self, parts_DN: torch.Tensor) -> torch.Tensor:
        """[R, N] of what every rank has the whole of."""
        out = parts_DN.new_zeros(len(self.keys), parts_DN.shape[1])
        return out.index_add_(0, constants.index(self.members, out.device), parts_DN)

    def sent(self, num_bytes: float) -> Sent:
        """What a rank sends of a range."""
        total = Sent()
        for ranks in self.inner:
            total += levels.reduced(num_bytes, ranks)
            num_bytes /= dist.get_world_size(ranks)
        return total + levels.exchanged(num_bytes, self.across)


class Wanted(NamedTuple):
    """The class of each of a group's ranks, `instance` neighbours of which make an instance."""

    group: Group
    keys: Sequence[int]
    instance: int


def routes(wanted: Sequence[Wanted], known: Sequence[Group], device: torch.device) -> list[Route]:
    """A route for each (collective, over all ranks).

    Equal classes have equal numbers of ranks, and the ranks of equal place ascend with the class.

    Args:
        known: groups that there are.
    """
    own = dist.get_rank()
    plans = [
        plan(dist.get_process_group_ranks(one.group), one.keys, one.instance, own) for one in wanted
    ]
    made = collectives.new_groups(
        [ranks for found in plans for ranks in (*found.inner, found.across)], known, device
    )
    out = []
    for one, found in zip(wanted, plans, strict=True):
        names = sorted(set(one.keys))
        as_they_lie = found.order == sorted(found.order)
        out.append(
            Route(
                tuple(names), tuple(names.index(key) for key in one.keys), found.place,
                tuple(made[tuple(ranks)] for ranks in found.inner if len(ranks) > 1),
                made.get(tuple(found.across)),
                None if as_they_lie else torch.tensor(found.order, device=device),
            )
        )  # fmt: skip
    return out


class Plan(NamedTuple):
    """What a `Route` has, in ranks: of two reduce-scatters, which may be of one rank."""

    place: int
    inner: list[list[int]]
    across: list[int]
    order: list[int]


def plan(ranks: list[int], keys: Sequence[int], instance: int, rank: int) -> Plan:
    """Of one of the ranks, as in `Wanted`.

    A rank has the coordinates (a, b, k): number a of those of its class that are in its instance,
    the class' instance b, and the class k. Shards go by a, then b, then k.
    """
    classes = [[n for n, key in enumerate(keys) if key == name] for name in sorted(set(keys))]
    if any(list(p) != sorted(p) for p in zip(*classes, strict=True)) or ranks != sorted(ranks):
        raise RuntimeError(f"rows {list(keys)} of ranks {ranks} are not in the order of ranks.")
    size, instances = len(classes[0]), len(ranks) // instance
    each = sum(n // instance == classes[0][0] // instance for n in classes[0])
    runs = [some[t : t + each] for some in classes for t in range(0, size, each)]
    if any(len(run) != each or run[0] // instance != run[-1] // instance for run in runs):
        each = size  # they don't lie alike in the instances: one reduce-scatter among all
    numbers = {n: (t % each, t // each, k) for k, some in enumerate(classes)
               for t, n in enumerate(some)}  # fmt: skip
    places = [n % instance * instances + n // instance for n in range(len(ranks))]
    own = ranks.index(rank)
    a, b, k = numbers[own]
    members = classes[k]
    return Plan(
        places[own],
        [
            [ranks[n] for n in some]
            for some in (members[b * each : (b + 1) * each], members[a::each])
        ],
        [ranks[some[b * each + a]] for some in classes],
        [places[n] for n in sorted(numbers, key=numbers.__getitem__)],
    )
