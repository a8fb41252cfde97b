"""The plugin's own collectives in a step: what they send, at least, is counted (`meter`).

A group of None or of one rank sends nothing and changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_dr.mcore import meter, progress

Group = Any  # a process group; torch's own annotations have None for the whole world


def all_reduce(value: torch.Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> None:
    """In place."""
    if dist.get_world_size(group) > 1:
        with progress.waiting(progress.begun(group)):
            dist.all_reduce(value, op, group)
        meter.sent(all_reduce_bytes(value.nbytes, dist.get_world_size(group)))


def gathered(part: torch.Tensor, group: Group) -> torch.Tensor:
    """Parts [n, ...] of all ranks of the group, one after the other along the first dimension."""
    size = dist.get_world_size(group)
    out = part.new_empty(part.shape[0] * size, *part.shape[1:])
    if out.numel():
        with progress.waiting(progress.begun(group)):
            dist.all_gather_into_tensor(out, part.contiguous(), group)
        meter.sent(scatter_bytes(out.nbytes, size))
    return out


def gathering(out: torch.Tensor, part: torch.Tensor, group: Group) -> Any:
    """part [1, N] of every rank: out [D, N], once the handle that is returned was waited for."""
    meter.sent(scatter_bytes(out.nbytes, dist.get_world_size(group)))
    handle = dist.all_gather_into_tensor(out, part.contiguous(), group, async_op=True)
    return progress.Begun(handle, group)


def exchanged(out: torch.Tensor, part: torch.Tensor, group: Group, counted: bool = True) -> Any:
    """part [R, N], of which rank r gets row r of every rank: out [R, N], once the handle that is
    returned was waited for.

    Args:
        counted: False where it stands for a reduction of Megatron's that is left out.
    """
    if counted:
        meter.sent(scatter_bytes(part.nbytes, dist.get_world_size(group)))
    return progress.Begun(dist.all_to_all_single(out, part, group=group, async_op=True), group)


def scattered(out: torch.Tensor, part: torch.Tensor, group: Group, counted: bool = True) -> Any:
    """part [g R, N] summed over g ranks, of which rank r gets rows r R .. (r + 1) R - 1: out
    [R, N], once the handle that is returned was waited for."""
    if counted:
        meter.sent(scatter_bytes(part.nbytes, dist.get_world_size(group)))
    return progress.Begun(dist.reduce_scatter_tensor(out, part, group=group, async_op=True), group)


def new_groups(
    wanted: Sequence[Sequence[int]], known: Sequence[Group], device: torch.device
) -> dict[tuple[int, ...], Group]:
    """A group for each list of ranks that this rank is in, by the list (collective, all ranks).

    Lists of one rank need none; those of known groups are not made again. Their timeout is that of
    the known ones.
    """
    have = {tuple(dist.get_process_group_ranks(group)): group for group in known}
    have = {ranks: group for ranks, group in have.items() if len(ranks) > 1}
    own = {tuple(ranks) for ranks in wanted if len(ranks) > 1} - have.keys()
    of_all = dist.group.WORLD if not known else known[0]  # a stage may have no gradients at all
    timeout = of_all._get_backend(device).options._timeout  # type: ignore[union-attr]
    for ranks in sorted({ranks for some in of_all_ranks(own) for ranks in some}):
        made = dist.new_group(list(ranks), timeout=timeout)
        if ranks in own:
            have[ranks] = made
    return have


def from_first(value: torch.Tensor, group: Group) -> None:
    """The values of the group's first rank, in place."""
    if value.numel() and dist.get_world_size(group) > 1:
        with progress.waiting(progress.begun(group)):
            dist.broadcast(value, dist.get_global_rank(group, 0), group)
        meter.sent(scatter_bytes(value.nbytes, dist.get_world_size(group)))


class Heard(ValueError):
    """A rank has refused what it was given, and every rank of the group has heard it."""


@dataclass(frozen=True)
class Refusal:
    """What a rank sends in place of a value, wherever the others are."""

    sentence: str


def of_all_ranks(value: Any, group: Group = None) -> list[Any]:
    """Every rank's value, of any type, by rank; not in a step.

    Raises:
        Heard: a rank has sent a refusal instead.
    """
    found: list[Any] = [None] * dist.get_world_size(group)
    with progress.waiting(progress.begun(group)):
        dist.all_gather_object(found, value, group)
    refusals = {rank: one.sentence for rank, one in enumerate(found) if isinstance(one, Refusal)}
    if refusals:
        raise Heard(of_whom(refusals, len(found)))
    return found


def to_first(value: Any) -> list[Any]:
    """Every rank's value, of any type, by rank: on rank 0; nothing on the others."""
    first = dist.get_rank() == 0
    found: list[Any] = [None] * (dist.get_world_size() if first else 0)
    dist.gather_object(value, found if first else None)
    return found


def of_whom(refusals: dict[int, str], ranks: int) -> str:
    """The first refusal, with the ranks that have it where not all of them do."""
    first = next(iter(refusals.values()))
    of_it = [rank for rank, sentence in refusals.items() if sentence == first]
    return first if len(of_it) == ranks else f"{first} (on {said(of_it)})"


def said(ranks: list[int]) -> str:
    """Ranks in a sentence: a few, and how many more."""
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s'[: len(ranks) > 1]} {', '.join(map(str, ranks[:8]))}{more}"


def all_reduce_bytes(num_bytes: int, ranks: int) -> int:
    """2 (n - 1)/n: a reduce-scatter and an all-gather."""
    return 2 * (ranks - 1) * num_bytes // ranks


def scatter_bytes(num_bytes: int, ranks: int) -> int:
    """(n - 1)/n: of a reduce-scatter, an all-gather, an all-to-all."""
    return (ranks - 1) * num_bytes // ranks
