"""The process that `sandbox` starts: cuts the program off, runs it, and ends all that it started.

It reads what to run from its input and answers with one line of JSON, {"passed": ...}, or
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

from megatron_dr.rl.sandbox import Limits, apart, calls, landlock, screen, watch

_MIB = 1 << 20
_FILES = 128  # open at a time, in each process: what is unread in pipes and sockets is memory
_CORE = 1  # byte: no dump, and unlike 0 no start of the program that the machine has for dumps
_WAKING = {signal.SIGCHLD, signal.SIGTERM}


def main() -> None:
    about = json.load(sys.stdin)
    limits, program = Limits(*about["limits"]), _Program(about)
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAKING)  # `_ended` takes them
    calls.prctl(calls.PR_SET_PDEATHSIG, signal.SIGTERM)  # who waits for the result is gone: clear
    calls.prctl(calls.PR_SET_CHILD_SUBREAPER, 1)  # orphans become this process's children
    calls.prctl(calls.PR_SET_NO_NEW_PRIVS, 1)  # all that the program starts can be killed
    if about["unsafe"]:
        _run_as_the_user(program, limits)
    else:
        _run_apart(program, limits)
    os._exit(0)


def _answer(**values: Any) -> None:
    os.write(1, json.dumps(values).encode() + b"\n")


# -- apart from the user's files -------------------------------------------------------------------
def _run_apart(program: "_Program", limits: Limits) -> None:
    """The answer is given by the first process of the namespace, which sees all others."""
    try:
        apart.leave(limits.file_mib)
    except OSError as error:
        return _answer(impossible=str(error))
    first = os.fork()
    if not first:
        with _no_return():
            _first_process(program, limits)
    if _ended(first, limits.wall_seconds) is None:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)  # it ends when all processes of the namespace have


def _first_process(program: "_Program", limits: Limits) -> None:
    calls.prctl(calls.PR_SET_PDEATHSIG, signal.SIGKILL)
    calls.prctl(calls.PR_SET_DUMPABLE, 0)
    try:
        apart.show_processes()
        landlock.write_only_in(apart.FOLDER, apart.DEVICES)
        _lower(resource.RLIMIT_CORE, _CORE)
        screen.forbid_some()
    except OSError as error:
        return _answer(impossible=str(error))
    os.chdir(apart.FOLDER)
    program.write()
    readable, closed = os.pipe()
    child = os.fork()
    if not child:
        with _no_return():
            calls.prctl(calls.PR_SET_DUMPABLE, 1)  # else who watches could not look
            os.close(closed)
            program.begin(limits)
    os.close(closed)
    os.read(readable, 1)
    passed = watch.ends_well(child, limits)
    watch.end_all()
    _answer(passed=passed and program.told())


# -- as the user -----------------------------------------------------------------------------------
def _run_as_the_user(program: "_Program", limits: Limits) -> None:
    program.write()
    _lower(resource.RLIMIT_CORE, _CORE)
    with contextlib.suppress(OSError):  # at least no network, and an end of its processes
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET | os.CLONE_NEWPID)
    child = os.fork()  # the first process of a new process namespace: all of it ends with it
    if not child:
        with _no_return():
            calls.prctl(calls.PR_SET_PDEATHSIG, signal.SIGKILL)
            program.begin(limits)
    passed = _ended(child, limits.wall_seconds) == 0
    _end_children()
    _answer(passed=passed and program.told())


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
class _Program:
    """Its code in this folder, its tests in a file without a name, a pipe for what it tells."""

    def __init__(self, about: dict[str, Any]) -> None:
        names = ("code", "tests", "token")
        texts: list[bytes] = [about[name].encode(errors="replace") for name in names]
        self._code, self._tests, self._token = texts
        with open(f"{os.path.dirname(__file__)}/harness.py") as file:  # the sandbox may hide it
            self._harness = file.read()

    def write(self) -> None:
        with open("program.py", "wb") as file:
            file.write(self._code)
        self._given = open("tests", "w+b", buffering=0)
        os.unlink("tests")
        self._given.write(self._token + b"\n" + self._tests)
        self._heard, self._tells = os.pipe()

    def begin(self, limits: Limits) -> None:
        """This process becomes it, with nothing open but what it is given."""
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        given = (self._given.fileno(), self._tells)
        for number in given:
            os.set_inheritable(number, True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WAKING)
        os.setsid()  # signals to its process group don't reach this one's parents
        os.nice(5)  # who watches is heard
        _limit(limits)
        os.execv(sys.executable, [sys.executable, "-I", "-c", self._harness, *map(str, given)])

    def told(self) -> bool:
        """Whether it told the token and nothing else; all its processes have ended."""
        os.close(self._tells)
        return os.read(self._heard, 1 << 16) == self._token


def _limit(limits: Limits) -> None:
    _lower(resource.RLIMIT_CPU, limits.cpu_seconds)
    _lower(resource.RLIMIT_AS, limits.memory_mib * _MIB)
    _lower(resource.RLIMIT_FSIZE, limits.file_mib * _MIB)
    _lower(resource.RLIMIT_NOFILE, _FILES)
    _lower(resource.RLIMIT_NPROC, limits.processes)


def _lower(kind: int, amount: int) -> None:
    hard = resource.getrlimit(kind)[1]
    amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
    resource.setrlimit(kind, (amount, amount))


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
