"""Runs a model's Python code with tests, apart from the user's files, processes and network.

The code sees the machine's files read-only and as the user may read them. It writes to one private
folder in memory, which is its /tmp and /var/tmp, too, and ends with it. /dev has the harmless
devices alone, /run is empty, /proc has its own processes, there is no network, the environment is
empty, and system calls are refused that give memory outside of all this, the user's keys, or
sockets on which the user's programs listen. Linux namespaces do so, without root. `Limits` holds
for all processes of a run together, which are looked at every 20 milliseconds; address space is
limited for each. Nothing outlives a run.

Where the machine can't give that, `passes` refuses, unless the environment variable
MEGATRON_DR_UNSAFE_SANDBOX is 1, as --dr-rl-unsafe-sandbox sets it for reward workers. The code then
runs as the user: it may read, write and delete the user's files and use the network. Limits are
those of each process (of a user's processes together, but for root's), and what it leaves behind is
killed, unless it kills the launcher first.

What remains: the code may read what the user may read, though nothing but its result leaves the
sandbox; it runs in one interpreter with its tests; and the kernel is the user's own. Against code
that attacks kernels, train in a virtual machine.
"""

import contextlib
import json
import os
import signal
import sys
from typing import Any, NamedTuple

# what the launcher, which loads this file for each run, does not need is imported late

UNSAFE = "MEGATRON_DR_UNSAFE_SANDBOX"
_ROOT = os.path.abspath(f"{__file__}/../../../..")
_BOOT = "import sys; sys.path.insert(0, sys.argv[1])\n" \
        "from megatron_dr.rl.sandbox import launcher; launcher.main()"  # fmt: skip
_GRACE = 5.0  # seconds for the launcher to start and to clear up


class Impossible(ValueError):
    """This machine can't keep the code apart from the user's files."""


class Limits(NamedTuple):
    """What one run may use, all its processes together: seconds, MiB, processes and threads.

    `file_mib` is memory beside `memory_mib`.
    """

    wall_seconds: float = 8.0
    cpu_seconds: int = 4
    memory_mib: int = 1024
    file_mib: int = 16
    processes: int = 64


def passes(code: str, tests: str, limits: Limits | None = None) -> bool:
    """Whether `code`, and then `tests` in the same names, run to their end without an error.

    The end is told by a token, which code that exits early does not have. Code that finds it, or
    leaves tests out by other means, would pass any tests: what passes runs once more with tests
    that fail at their end, and fails if it passes them, too.

    Raises:
        Impossible: the machine can't keep the code apart, and may not run it otherwise.
        ValueError: the tests take more than half of `Limits.file_mib`.
    """
    limits = limits or Limits()
    most = limits.file_mib * 2**19
    if (size := len(tests.encode(errors="replace"))) > most:
        raise ValueError(f"tests of {size} bytes are more than the {most} that a sample may have.")
    if len(code.encode(errors="replace")) > most:  # a file that is cut could pass
        return False
    if not _reaches_end(code, tests, limits):
        return False
    if _reaches_end(code, f"{tests}\nraise AssertionError", limits):
        import logging

        logging.getLogger(__name__).warning(
            "code of a model passes tests that fail: it forges the result, and fails."
        )
        return False
    return True


def check() -> None:
    """Raise Impossible where `passes` would."""
    _reaches_end("", "", Limits())


def _reaches_end(code: str, tests: str, limits: Limits) -> bool:
    import tempfile

    about = {"code": code, "tests": tests, "limits": limits, "token": os.urandom(16).hex()}
    answer = _run(about | {"unsafe": False}, limits, "/")
    if "impossible" in answer:
        if os.environ.get(UNSAFE) != "1":
            raise Impossible(
                "models' code can't be kept apart from the user's files on this machine "
                f"({answer['impossible']}): allow unprivileged user namespaces (in a container, "
                "its security profile decides), run on another machine, or give "
                "--dr-rl-unsafe-sandbox to let the code read, write and delete what the user may."
            )
        with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
            answer = _run(about | {"unsafe": True}, limits, folder)
    return answer.get("passed", False) is True


def _run(about: dict[str, Any], limits: Limits, folder: str) -> dict[str, Any]:
    """What the launcher answers; nothing where it had to be killed."""
    import subprocess

    answer = b""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _BOOT, _ROOT], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder,
        # one thread of mathematics: threads count
        env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            text = json.dumps(about).encode()
            answer, _ = process.communicate(text, limits.wall_seconds + _GRACE)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):  # nobody is left, unless it hangs
                os.killpg(process.pid, signal.SIGKILL)
    if not answer and process.returncode > 0:  # it was not killed
        return {"impossible": f"its launcher ended with code {process.returncode}"}
    found: dict[str, Any] = json.loads(answer) if answer else {}
    return found
