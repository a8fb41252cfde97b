"""Where this rank is in a step of ours: a note that costs an attribute, read by `stall`'s thread.

Of every group of ranks that our own collectives run in, their number so far is kept: of two ranks
of a group the one with the smaller number has not arrived.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist


@dataclass
class Here:
    """Of this process.

    Attributes:
        step: under way, or the last one.
        inside: whether it is under way.
        where: in it.
        part: of our own work (`meter.part`); empty: Megatron's forwards and backwards.
        counts: collectives begun in each group, by its name.
        waits: the group's name and the collective's number, where one is waited for; else None.
        moved: when any of this changed last, by the monotonic clock.
    """

    step: int = -1
    inside: bool = False
    where: tuple[str, int, str] | None = None
    part: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    waits: tuple[str, int] | None = None
    moved: float = 0.0

    def said(self) -> str:
        """In a sentence."""
        if not self.inside:
            return "between steps" if self.step >= 0 else "before the first step"
        place = self.part or "forwards and backwards"
        if self.where is not None:
            role, number, way = self.where
            place += f", {way} of {role} microbatch {number}"
        return f"step {self.step}, {place}"


here = Here()


@contextmanager
def in_step(step: int) -> Iterator[None]:
    here.step, here.inside, here.where, here.part = step, True, None, ""
    here.moved = time.monotonic()
    try:
        yield
    finally:
        here.inside, here.moved = False, time.monotonic()


def at(role: str, number: int, backward: bool) -> None:
    """A microbatch begins."""
    here.where = (role, number, "backward" if backward else "forward")
    here.moved = time.monotonic()


def name_of(group: Any) -> str:
    """The same on all its ranks."""
    return str(getattr(group, "group_name", "")) if group is not None else ""


def begun(group: Any) -> tuple[str, int]:
    """A collective of ours begins: its group's name, and its number in it."""
    name = name_of(group)
    here.counts[name] = number = here.counts.get(name, 0) + 1
    return name, number


@contextmanager
def waiting(begun_: tuple[str, int]) -> Iterator[None]:
    """A collective that has begun is waited for inside."""
    before, here.waits, here.moved = here.waits, begun_, time.monotonic()
    try:
        yield
    finally:
        here.waits, here.moved = before, time.monotonic()


class Begun:
    """A collective that travels: torch's handle of it, by which it is waited for."""

    def __init__(self, handle: Any, group: Any) -> None:
        self._handle, self._begun = handle, begun(group)

    def wait(self) -> None:
        with waiting(self._begun):
            self._handle.wait()


def ranks_of(name: str) -> list[int]:
    """Of a group of this rank's."""
    if not name:
        return list(range(dist.get_world_size()))
    for group in dist.distributed_c10d._world.pg_map:
        if name_of(group) == name:
            return list(dist.get_process_group_ranks(group))
    return []
