"""Runs a model's Python code with tests, apart from the user's files, processes and network.

The code sees the machine's files read-only and as the user may read them. It writes to one private
folder in memory, which is its /tmp and /var/tmp, too, and ends with it. /dev has the harmless
devices alone, /run is empty, /proc has its own processes, there is no network, the environment is
empty, and system calls are refused that give memory outside of all this, or sockets on which the
user's programs listen. Linux namespaces do so, without root. `Limits` holds for all processes of a
run together, which are looked at every 20 milliseconds; address space and CPU time are limited for
each. Nothing outlives a run.

Where the machine can't give that, `passes` refuses, unless the environment variable
MEGATRON_DR_UNSAFE_SANDBOX is 1, as --dr-rl-unsafe-sandbox sets it for reward workers. The code then
runs as the user: it may read, write and delete the user's files and use the network. Limits are
those of each process (of a user's processes together, but for root's), and what it leaves behind is
killed, unless it kills the launcher first.

What remains: the code may read what the user may read, though nothing but its result leaves the
sandbox, and the kernel is the user's own. Against code that attacks kernels, train in a virtual
machine.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

UNSAFE = "MEGATRON_DR_UNSAFE_SANDBOX"
_ROOT = str(Path(__file__).parents[3])
_BOOT = "import sys; sys.path.insert(0, sys.argv[1])\n" \
        "from megatron_dr.rl.sandbox import launcher; launcher.main()"  # fmt: skip
_GRACE = 5.0  # seconds for the launcher to start and to clear up


class Impossible(ValueError):
    """This machine can't keep the code apart from the user's files."""


@dataclass(frozen=True)
class Limits:
    """What one run may use, all its processes together: seconds, MiB, processes.

    `cpu_seconds` is each process's; `file_mib` is memory beside `memory_mib`.
    """

    wall_seconds: float = 8.0
    cpu_seconds: int = 4
    memory_mib: int = 1024
    file_mib: int = 16
    processes: int = 64


def passes(code: str, tests: str, limits: Limits | None = None) -> bool:
    """Whether `code`, followed by `tests`, runs to its end without an error.

    The end is told by a token printed after the tests, so that code which exits early fails. Code
    that reads its own source and prints the token does pass.

    Raises:
        Impossible: the machine can't keep the code apart, and may not run it otherwise.
    """
    limits = limits or Limits()
    token = secrets.token_hex(16)
    ending = f"import os as _os\n_os.write(1, b'\\n{token}\\n')\n"
    program = f"{code}\n{tests}\n{ending}".encode(errors="replace")
    answer = _run(program, token, limits, "/")
    if "impossible" in answer:
        if os.environ.get(UNSAFE) != "1":
            raise Impossible(
                "models' code can't be kept apart from the user's files on this machine "
                f"({answer['impossible']}): allow unprivileged user namespaces (in a container, "
                "its security profile decides), run on another machine, or give "
                "--dr-rl-unsafe-sandbox to let the code read, write and delete what the user may."
            )
        with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
            answer = _run(program, token, limits, folder, unsafe=True)
    return answer.get("passed", False) is True


def check() -> None:
    """Raise Impossible where `passes` would."""
    passes("", "")


def _run(
    program: bytes, token: str, limits: Limits, folder: str, unsafe: bool = False
) -> dict[str, Any]:
    """What the launcher answers; nothing where it had to be killed."""
    about = {"limits": asdict(limits), "token": token, "unsafe": unsafe}
    answer = b""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _BOOT, _ROOT, json.dumps(about)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder,
        env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"}, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            answer, _ = process.communicate(program, limits.wall_seconds + _GRACE)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):  # nobody is left, unless it hangs
                os.killpg(process.pid, signal.SIGKILL)
    if not answer and process.returncode > 0:  # it was not killed
        return {"impossible": f"its launcher ended with code {process.returncode}"}
    found: dict[str, Any] = json.loads(answer) if answer else {}
    return found
