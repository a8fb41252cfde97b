"""Run by `sandbox` as a script: cuts itself off, sets limits, then becomes the program.

Arguments: the limits as JSON, and the program's file. Standard library alone.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1
_MIB = 1 << 20


def main() -> None:
    limits = json.loads(sys.argv[1])
    _die_with_parent()
    _leave_namespaces()
    child = os.fork()  # the first process of a new process namespace: all of it ends with it
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(0 if status == 0 else 1)
    _die_with_parent()
    _limit(limits)
    os.execv(sys.executable, [sys.executable, "-I", sys.argv[2]])


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _leave_namespaces() -> None:
    """No network and an own process namespace; where the kernel forbids them, go on without."""
    with contextlib.suppress(OSError):
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET | os.CLONE_NEWPID)


def _limit(limits: dict[str, int]) -> None:
    for kind, amount in (
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_AS, limits["memory_mib"] * _MIB),
        (resource.RLIMIT_FSIZE, limits["file_mib"] * _MIB),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
        resource.setrlimit(kind, (amount, amount))


if __name__ == "__main__":
    main()
