"""Runs a program in the sandbox and looks at it from outside while it waits."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_dr.rl import sandbox
from megatron_dr.rl.sandbox import Limits

_CAN = "import os; os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET | os.CLONE_NEWPID)"
needs_namespaces = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", _CAN], capture_output=True).returncode != 0,
    reason="this kernel forbids user namespaces",
)
PATIENT = Limits(wall_seconds=100.0, cpu_seconds=30)

_TRYING = """
import ctypes, errno, json, os, signal, socket, struct, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)
arm = os.uname().machine != "x86_64"

def call(number, *arguments):
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    number = number[arm] if isinstance(number, tuple) else number
    result = libc.syscall(ctypes.c_long(number), *words)
    if result < 0:
        raise OSError(ctypes.get_errno(), "call")
    return result

def tried(attempt):
    # what it got: an error's name, or its value
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(20)
        os.setsid()
        try:
            names = dict(globals())
            exec(attempt, names)
            said = f"done: {names.get('got')}"
        except OSError as error:
            said = errno.errorcode.get(error.errno, repr(error))
        except BaseException as error:
            said = repr(error)
        os.write(writing, said.encode()[:4000])
        os._exit(0)
    os.close(writing)
    said = os.read(reading, 4096).decode()
    os.close(reading)
    status = os.waitpid(child, 0)[1]
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else said

libc.prctl(15, name.encode(), 0, 0, 0)
found = {key: tried(attempt) for key, attempt in attempts.items()}
open("/tmp/part", "w").write(json.dumps(found))
os.rename("/tmp/part", "/tmp/report")
while not os.path.exists("/tmp/go"):
    time.sleep(0.01)
"""


@contextlib.contextmanager
def inside(attempts: dict[str, str], **given: Any) -> Iterator[tuple[dict[str, str], Path]]:
    """What each attempt got, and the waiting program's folder in /proc.

    The report is read from the program's own /tmp, which has no other way out.
    """
    name = f"tries{os.getpid()}"
    texts = {"name": name, "attempts": attempts, **given}
    code = "\n".join(f"{key} = {value!r}" for key, value in texts.items()) + _TRYING
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(sandbox._reaches_end, code, "", PATIENT)
        process = _waiting(name)
        folder = process / "root" / "tmp"
        try:
            yield json.loads((folder / "report").read_text()), process
        finally:
            (folder / "go").touch()
        assert run.result(), "the program did not go on to its end"


def _waiting(name: str) -> Path:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for path in Path("/proc").glob("[0-9]*/comm"):
            with contextlib.suppress(OSError):
                found = path.parent / "root" / "tmp" / "report"
                if path.read_text().strip() == name and found.exists():
                    return path.parent
        time.sleep(0.05)
    raise AssertionError("the program did not report")
