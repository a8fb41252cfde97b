"""Moments of a run, counted in each rank, and what happens to it at one of them.

A moment has a kind and a number: the n-th time that a rank begins a microbatch or a collective,
hands a batch to reward workers, or is about to make, opened or replaced a file of its own. Both the
file's opening and what comes before it count, so that a run may end with a file that is empty, and
between any two of them. Counts are shared with a rank's forks, which write checkpoints, and with
the process that starts the ranks.
"""

import builtins
import io
import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_dr.mcore import progress
from megatron_dr.rl.reward_pool import RewardPool

KINDS = ("step", "exchange", "rewards", "save", "time")
ENDS = ("kill", "kill all", "terminate", "stop", "full disk")
_COLLECTIVES = (
    "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single",
    "broadcast", "barrier", "all_gather_object", "batch_isend_irecv",
)  # fmt: skip
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link")
FILLER = "filler"


class Trap(NamedTuple):
    """What happens to a run.

    Attributes:
        end: one of ENDS.
        rank: the one that is counted, and to which it happens.
        kind, number: when; of kind "time" the number is of milliseconds from the rank's start.
        file: of kind "save": files whose paths have this in them are counted alone.
    """

    end: str
    rank: int
    kind: str
    number: int
    file: str = ""


class Counts:
    """Of all ranks of a run: made before they are forked."""

    def __init__(self, world: int) -> None:
        self._size = 8 * (len(KINDS) + 1)
        self._shared = mmap.mmap(-1, world * self._size)

    def _place(self, rank: int, kind: str) -> int:
        return rank * self._size + 8 * (*KINDS, "sprung").index(kind)

    def of(self, rank: int, kind: str) -> int:
        return int(struct.unpack_from("q", self._shared, self._place(rank, kind))[0])

    def put(self, rank: int, kind: str, value: int) -> None:
        struct.pack_into("q", self._shared, self._place(rank, kind), value)


def lay(rank: int, counts: Counts, trap: Trap | None, folder: Path) -> None:
    """On a rank, before its run: count from now on, and spring the trap.

    Args:
        folder: what is in it are files of the run; of a full disk it is the disk.
    """
    own, began = os.getpid(), time.monotonic()
    mine = trap if trap is not None and trap.rank == rank else None

    def at(kind: str, path: str = "") -> None:
        if counts.of(rank, "sprung") or (mine is not None and mine.file not in path):
            return
        number = counts.of(rank, kind) + 1
        counts.put(rank, kind, number)
        counts.put(rank, "time", int(1000 * (time.monotonic() - began)))
        if mine is None:
            return
        late = mine.kind == "time" and counts.of(rank, "time") >= mine.number
        if late or (mine.kind == kind and number >= mine.number):
            counts.put(rank, "sprung", 1)
            _spring(mine.end, own, folder)

    _watch_steps(at)
    _watch_files(at, str(folder) + os.sep)


def _spring(end: str, rank: int, folder: Path) -> None:
    if end == "full disk":
        _fill(folder)
    elif end == "kill":
        os.kill(rank, signal.SIGKILL)
    elif end == "stop":
        os.kill(rank, signal.SIGSTOP)  # who has started it wakes it
    else:
        os.killpg(os.getpgrp(), signal.SIGKILL if end == "kill all" else signal.SIGTERM)
    if end == "kill":
        time.sleep(60.0 if os.getpid() == rank else 0.0)  # the signal is on its way


def _fill(folder: Path) -> None:
    """To the last byte."""
    with open(folder / FILLER, "ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def _watch_steps(at: Callable[[str], None]) -> None:
    def counted(stock: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            at(kind)
            return stock(*args, **kwargs)

        return call

    progress.at = counted(progress.at, "step")
    for name in _COLLECTIVES:
        setattr(dist, name, counted(getattr(dist, name), "exchange"))
    RewardPool.score = counted(RewardPool.score, "rewards")  # type: ignore[method-assign]


def _watch_files(at: Callable[[str, str], None], folder: str) -> None:
    def is_own(path: Any) -> bool:
        named = isinstance(path, str | os.PathLike)
        return named and os.fspath(path).startswith(folder) and not str(path).endswith(FILLER)

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR)
            if writes and is_own(path):
                at("save", os.fspath(path))
        elif event in _CHANGES and is_own(args[0]):
            at("save", os.fspath(args[0]))

    stock = builtins.open

    def opened(path: Any, mode: str = "r", *rest: Any, **kwargs: Any) -> Any:
        file = stock(path, mode, *rest, **kwargs)
        if is_own(path) and any(letter in mode for letter in "wax"):
            at("save", os.fspath(path))
        return file

    sys.addaudithook(hear)
    builtins.open = io.open = opened  # type: ignore[assignment]
