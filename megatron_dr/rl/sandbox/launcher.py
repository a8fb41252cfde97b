"""The process that `sandbox` starts: cuts the program off, runs it, and ends all that it started.

It reads the program from its input and answers with one line of JSON, {"passed": ...}, or
{"impossible": why} where the program was not run. Standard library alone.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from megatron_dr.rl.sandbox import Limits, apart, calls, watch

_MIB = 1 << 20
_FILES = 128  # open at a time, in each process: what is unread in pipes and sockets is memory
_TAIL = 1 << 20  # bytes of what was printed
_WAKING = {signal.SIGCHLD, signal.SIGTERM}


def main() -> None:
    about, program = json.loads(sys.argv[2]), sys.stdin.buffer.read()
    limits, token = Limits(**about["limits"]), about["token"].encode()
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAKING)  # `_ended` takes them
    calls.prctl(calls.PR_SET_PDEATHSIG, signal.SIGTERM)  # who waits for the result is gone: clear
    calls.prctl(calls.PR_SET_CHILD_SUBREAPER, 1)  # orphans become this process's children
    calls.prctl(calls.PR_SET_NO_NEW_PRIVS, 1)  # all that the program starts can be killed
    if about["unsafe"]:
        _run_as_the_user(program, token, limits)
    else:
        _run_apart(program, token, limits)
    os._exit(0)


def _answer(**values: Any) -> None:
    os.write(1, json.dumps(values).encode() + b"\n")


# -- apart from the user's files -------------------------------------------------------------------
def _run_apart(program: bytes, token: bytes, limits: Limits) -> None:
    """The answer is given by the first process of the namespace, which sees all others."""
    try:
        apart.leave(limits.file_mib)
    except OSError as error:
        return _answer(impossible=str(error))
    first = os.fork()
    if not first:
        with _no_return():
            _first_process(program, token, limits)
    if _ended(first, limits.wall_seconds) is None:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)  # it ends when all processes of the namespace have


def _first_process(program: bytes, token: bytes, limits: Limits) -> None:
    calls.prctl(calls.PR_SET_PDEATHSIG, signal.SIGKILL)
    calls.prctl(calls.PR_SET_DUMPABLE, 0)
    try:
        apart.show_processes()
        calls.forbid_some()
    except OSError as error:
        return _answer(impossible=str(error))
    os.chdir(apart.FOLDER)
    printed = _write_program(program)
    child = os.fork()
    if not child:
        with _no_return():
            _become_program(printed, limits)
    passed = watch.ends_well(child, limits)
    watch.end_all()
    _answer(passed=passed and _told(printed, token))


# -- as the user -----------------------------------------------------------------------------------
def _run_as_the_user(program: bytes, token: bytes, limits: Limits) -> None:
    printed = _write_program(program)
    with contextlib.suppress(OSError):  # at least no network, and an end of its processes
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET | os.CLONE_NEWPID)
    child = os.fork()  # the first process of a new process namespace: all of it ends with it
    if not child:
        with _no_return():
            calls.prctl(calls.PR_SET_PDEATHSIG, signal.SIGKILL)
            _become_program(printed, limits)
    passed = _ended(child, limits.wall_seconds) == 0
    _end_children()
    _answer(passed=passed and _told(printed, token))


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


# -- the program -----------------------------------------------------------------------------------
def _write_program(program: bytes) -> int:
    """In this folder; what it prints goes to a file that is given."""
    with open("program.py", "wb") as file:
        file.write(program)
    return os.open("printed", os.O_RDWR | os.O_CREAT, 0o600)


def _become_program(printed: int, limits: Limits) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for own, number in ((nothing, 0), (printed, 1), (nothing, 2)):
        os.dup2(own, number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WAKING)
    os.nice(5)  # who watches is heard
    _limit(limits)
    os.execv(sys.executable, [sys.executable, "-I", "program.py"])


def _limit(limits: Limits) -> None:
    for kind, amount in (
        (resource.RLIMIT_CPU, limits.cpu_seconds),
        (resource.RLIMIT_AS, limits.memory_mib * _MIB),
        (resource.RLIMIT_FSIZE, limits.file_mib * _MIB), (resource.RLIMIT_NOFILE, _FILES),
        (resource.RLIMIT_NPROC, limits.processes), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        hard = resource.getrlimit(kind)[1]
        amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
        resource.setrlimit(kind, (amount, amount))


def _told(printed: int, token: bytes) -> bool:
    """Whether the token was printed at the end: what Python prints as it exits may follow."""
    return token in os.pread(printed, _TAIL, max(0, os.fstat(printed).st_size - _TAIL))


def _ended(child: int, seconds: float) -> int | None:
    """How a child ended; None where it is late, or is not wanted any more."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        signalled = signal.sigtimedwait(_WAKING, max(0.0, deadline - time.monotonic()))
        if signalled is None or signalled.si_signo == signal.SIGTERM:
            return None


@contextlib.contextmanager
def _no_return() -> Iterator[None]:
    """A child of this process does its work and nothing else of it."""
    try:
        yield
    finally:
        os._exit(1)
