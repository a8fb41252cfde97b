"""Watches the processes of a namespace from its first one, and ends them."""

import contextlib
import os
import resource
import signal
from typing import NamedTuple

from megatron_dr.rl.sandbox import Limits

_SECONDS = 0.02  # between two looks
_REAPED = 1000  # processes that ended, before the next look: their number may have no end
_PAGE = resource.getpagesize()
_TICKS = os.sysconf("SC_CLK_TCK")
_MIB = 1 << 20
_FILES = 1024  # open together: what is unread in pipes and sockets is memory that nobody has mapped


def ends_well(program: int, limits: Limits) -> bool:
    """Whether the program exits with 0 before the processes have too much together."""
    while True:
        with contextlib.suppress(ChildProcessError):
            for _ in range(_REAPED):
                ended, status = os.waitpid(-1, os.WNOHANG)  # orphans, too
                if ended == program:
                    return status == 0
                if not ended:
                    break
        if _too_much(limits):
            return False
        signal.sigtimedwait({signal.SIGCHLD}, _SECONDS)


def end_all() -> None:
    """Kill every process but this one, the first of the namespace, and wait for them."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _too_much(limits: Limits) -> bool:
    others = [pid for pid in os.listdir("/proc") if pid.isdigit() and pid != "1"]
    uses = list(map(_use, others))
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    if sum(use.threads for use in uses) > limits.processes or sum(map(_open, others)) > _FILES:
        return True
    if sum(use.seconds for use in uses) + ended.ru_utime + ended.ru_stime > limits.cpu_seconds:
        return True
    # what processes share is in the resident size of each: look closer where that is too much
    most = limits.memory_mib * _MIB
    return sum(use.resident for use in uses) > most and sum(map(_share, others)) > most


class _Use(NamedTuple):
    """What a process uses: seconds of CPU with those of children that ended, bytes in memory and
    of address space; it has none of that when it ends."""

    threads: int = 0
    seconds: float = 0.0
    resident: int = 0
    mapped: int = 0


def _use(pid: str) -> _Use:
    """By /proc/PID/stat, whose fields behind the name begin with the third."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = [b"", b"", b"", *file.read().rpartition(b")")[2].split()]
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return _Use()
    ticks = sum(map(int, fields[14:18]))
    return _Use(int(fields[20]), ticks / _TICKS, int(fields[24]) * _PAGE, int(fields[23]))


def _open(pid: str) -> int:
    """Descriptors of a process.

    Raises:
        PermissionError: it has hidden itself, but does not end.
    """
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except (FileNotFoundError, ProcessLookupError):
        return 0
    except PermissionError:
        if _use(pid).mapped:
            raise
        return 0


def _share(pid: str) -> int:
    """The same, with what n processes share counted as an n-th of it."""
    kibibytes = 0
    with (
        contextlib.suppress(FileNotFoundError, ProcessLookupError),
        open(f"/proc/{pid}/smaps_rollup") as file,
    ):
        for line in file:
            name, _, value = line.partition(":")
            if name in ("Pss", "SwapPss"):
                kibibytes += int(value.split()[0])
    return kibibytes * 1024
