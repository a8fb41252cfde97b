"""Run by `sandbox` as a script: cuts the program off, runs it, and ends all that it has started.

Arguments: the limits as JSON, and the program's file. It exits with 0 if the program does so in
time. Standard library alone.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_MIB = 1 << 20
_WAKING = {signal.SIGCHLD, signal.SIGTERM}


def main() -> None:
    limits = json.loads(sys.argv[1])
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAKING)  # `_wait` takes them
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # who waits for the result is gone: clear up
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans become this process's children
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)  # all that the program starts can be killed
    _leave_namespaces()
    child = os.fork()  # the first process of a new process namespace: all of it ends with it
    if not child:
        _become_program(limits)
    passed = _wait(child, limits["wall_seconds"])
    _end_children()
    os._exit(0 if passed else 1)


def _become_program(limits: dict[str, int]) -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WAKING)
    _limit(limits)
    os.execv(sys.executable, [sys.executable, "-I", sys.argv[2]])


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3)


def _leave_namespaces() -> None:
    """No network and an own process namespace; where the kernel forbids them, go on without."""
    with contextlib.suppress(OSError):
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET | os.CLONE_NEWPID)


def _limit(limits: dict[str, int]) -> None:
    for kind, amount in (
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_AS, limits["memory_mib"] * _MIB),
        (resource.RLIMIT_FSIZE, limits["file_mib"] * _MIB),
        (resource.RLIMIT_NPROC, limits["processes"]), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        hard = resource.getrlimit(kind)[1]
        amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
        resource.setrlimit(kind, (amount, amount))


def _wait(child: int, seconds: float) -> bool:
    """Whether the program exits with 0 in time."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        signalled = signal.sigtimedwait(_WAKING, max(0.0, deadline - time.monotonic()))
        if signalled is None or signalled.si_signo == signal.SIGTERM:
            return False


def _end_children() -> None:
    """Kill all children; theirs become this process's, until none is left."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, os.WNOHANG)  # raises where there is no child
            for pid in _children():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _children() -> Iterator[int]:
    """Processes whose parent is this one, by /proc/PID/stat: `pid (name) state parent ...`."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            with open(f"/proc/{pid}/stat", "rb") as file:
                parent = file.read().rpartition(b")")[2].split()[1]
            if int(parent) == os.getpid():
                yield int(pid)


if __name__ == "__main__":
    main()
