"""Ranks of the training entry that nobody ends but what happens to them, and what is left of them.

Each is a fork of this process, as in `_ranks`; they meet in a store of this process, as torchrun's
do. The store begins when all are forked: its thread looks peers' addresses up, and who is forked in
the middle of that finds glibc's resolver locked for ever. Orphans of theirs become this process's
children, and so are found.
"""

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron_dr.mcore.loop import train, writers

from .. import _warm
from .traps import Counts, Trap, lay

SURVIVORS = 30.0  # seconds that a survivor may live on
_WHOLE = 200.0  # seconds of a run
_LEFT = 10.0  # seconds until what belongs to a dead rank is gone
_PR_SET_CHILD_SUBREAPER = 36
_PORT = 4  # bytes of the store's port in the pipe


class Ended(NamedTuple):
    """How a run ended.

    Attributes:
        codes: exit status of each rank.
        said: by each rank.
        survived: seconds from the first rank's end to the last one's.
        counts: moments of each rank.
        left: processes that were there after it.
    """

    codes: list[int]
    said: list[str]
    survived: float
    counts: Counts
    left: list[str]


def launch(
    argv: list[str], world: int, folder: Path, trap: Trap | None = None, stopped: float = 20.0,
    own_writer: bool = False,
) -> Ended:  # fmt: skip
    """Run the entry, and wait until nothing of it is left.

    Args:
        folder: its files are in `run` below it, which is not there or what a run before has left.
        stopped: seconds that a stopped rank stands still.
        own_writer: each rank starts Megatron's process for checkpoints itself, as a run does that
            is no fork; seconds of each rank.

    Raises:
        AssertionError: it does not end.
    """
    if not own_writer:
        _warm.before_forks()
    counts, (ports, port) = Counts(world), os.pipe()
    logs = [folder / f"log.{rank}.txt" for rank in range(world)]
    with _adopting():
        before, ranks = _children(), list[int]()
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, ranks[0] if ranks else 0)
                lay_own = (rank, counts, trap, folder / "run")
                _child(argv, world, ports, logs[rank], lay_own, own_writer)
            with contextlib.suppress(OSError):
                os.setpgid(pid, ranks[0] if ranks else pid)
            ranks.append(pid)
        try:
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(port, store.port.to_bytes(_PORT) * world)
            codes, survived = _wait(ranks, stopped)
        finally:
            os.close(ports), os.close(port)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ranks[0], signal.SIGKILL)
            left = _leftovers(before)
    said = [path.read_text(errors="replace") for path in logs]
    return Ended(codes, said, survived, counts, left)


def _child(
    argv: list[str], world: int, ports: int, log: Path, own: tuple[int, Counts, Trap | None, Path],
    own_writer: bool,
) -> None:  # fmt: skip
    code, inherited = 1, set(multiprocessing.active_children())
    try:
        rank = str(own[0])
        os.environ.update(RANK=rank, WORLD_SIZE=str(world), LOCAL_RANK=rank)
        port = int.from_bytes(os.read(ports, _PORT))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.set_num_threads(1)
        with open(log, "w", buffering=1) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        faulthandler.register(signal.SIGUSR1)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))  # not pytest's
        if not own_writer:
            writers.in_fork()
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(minutes=5))
        lay(*own)
        sys.argv = ["megatron_dr.train", *argv]
        train.main(store)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):  # a full disk
            sys.stdout.flush()
        for child in set(multiprocessing.active_children()) - inherited:
            child.terminate()  # as an interpreter does that ends
        os._exit(code)


def _wait(ranks: list[int], stopped: float) -> tuple[list[int], float]:
    """Exit statuses, and seconds between the first end and the last; later ones are killed."""
    began, first, codes, woken = time.monotonic(), 0.0, dict[int, int](), dict[int, float]()
    while len(codes) < len(ranks):
        for pid in ranks:
            if pid in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if done and os.WIFSTOPPED(status):
                woken[pid] = time.monotonic() + stopped
            elif done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                first = first or time.monotonic()
        now = time.monotonic()
        for pid in [pid for pid, when in woken.items() if now > when]:
            del woken[pid]
            os.kill(pid, signal.SIGCONT)
        if (first and now - first > 2 * SURVIVORS) or now - began > _WHOLE:
            break
        time.sleep(0.02)
    survived = time.monotonic() - first if first else time.monotonic() - began
    for pid in set(ranks) - codes.keys():
        os.kill(pid, signal.SIGUSR1)  # its log has where it stands
    time.sleep(0.5)
    for pid in set(ranks) - codes.keys():
        os.kill(pid, signal.SIGKILL)
        codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return [codes[pid] for pid in ranks], survived


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Orphans among this process's descendants become its children."""
    control = ctypes.CDLL(None, use_errno=True).prctl
    assert control(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        control(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _children() -> set[int]:
    tasks = Path("/proc/self/task").iterdir()
    return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}


def _leftovers(before: set[int]) -> list[str]:
    """Processes that do not end by themselves; they are killed."""
    end = time.monotonic() + _LEFT
    while True:
        found = _children() - before
        for pid in list(found):
            if os.waitpid(pid, os.WNOHANG)[0]:
                found.remove(pid)
        if not found or time.monotonic() > end:
            break
        time.sleep(0.05)
    left = []
    for pid in found:
        left.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:300])
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return left
