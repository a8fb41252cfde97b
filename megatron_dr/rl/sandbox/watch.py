"""Watches the processes of a namespace from its first one, and ends them."""

import contextlib
import os
import resource
import signal

from megatron_dr.rl.sandbox import Limits

_SECONDS = 0.02  # between two looks
_PAGE = resource.getpagesize()
_MIB = 1 << 20


def ends_well(program: int, limits: Limits) -> bool:
    """Whether the program exits with 0 before the processes have too much together."""
    while True:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:  # orphans, too
                if ended[0] == program:
                    return ended[1] == 0
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
    if len(others) > limits.processes:
        return True
    # what processes share is in the resident size of each: look closer where that is too much
    most = limits.memory_mib * _MIB
    return sum(map(_resident, others)) > most and sum(map(_share, others)) > most


def _resident(pid: str) -> int:
    """Bytes of memory that a process has mapped."""
    with contextlib.suppress(OSError, IndexError), open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * _PAGE
    return 0


def _share(pid: str) -> int:
    """The same, with what n processes share counted as an n-th of it."""
    kibibytes = 0
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name in ("Pss", "SwapPss"):
                kibibytes += int(value.split()[0])
    return kibibytes * 1024
