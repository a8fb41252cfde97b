"""Runs a model's Python code with tests, in a process that is cut off as far as the host allows.

Limits: CPU time, address space, size of a file, number of processes (not where run as root, whom
the kernel exempts), wall time. The environment is empty and the working folder is a temporary one.
Nothing outlives the run, processes that left its session included. Where the kernel allows user
namespaces, it is the end of a process namespace that sees to it, and there is no network. Elsewhere
the launcher adopts and kills what the program leaves behind, the program may use the network, and
it could kill the launcher first.

Files stay readable as to the user: this stops accidents and resource hogs. Against code that is
written to break out, run the training in a container or a virtual machine.
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

_LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")
_OUTPUT = 1 << 20
_GRACE = 5.0  # seconds for the launcher to start and to clear up


@dataclass(frozen=True)
class Limits:
    """What one run may use: seconds, MiB, processes and threads."""

    wall_seconds: float = 8.0
    cpu_seconds: int = 4
    memory_mib: int = 1024
    file_mib: int = 16
    processes: int = 64


def passes(code: str, tests: str, limits: Limits | None = None) -> bool:
    """Whether `code`, followed by `tests`, runs to its end without an error.

    The end is told by a token printed after the tests, so that code which exits early fails. Code
    that reads its own source and prints the token does pass.
    """
    limits = limits or Limits()
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
        program = Path(folder, "program.py")
        ending = f"import os as _os\n_os.write(1, b'\\n{token}\\n')\n"
        program.write_text(f"{code}\n{tests}\n{ending}", encoding="utf-8", errors="replace")
        printed = Path(folder, "printed")
        with printed.open("wb") as output:
            finished = _run(program, output.fileno(), limits)
        with printed.open("rb") as output:
            output.seek(max(0, printed.stat().st_size - _OUTPUT))
            return finished and output.read().rstrip().endswith(token.encode())


def _run(program: Path, output: int, limits: Limits) -> bool:
    """Whether the program exits with 0 in time. The launcher ends it, and what it has started."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_LAUNCHER), json.dumps(asdict(limits)), program.name],
        stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.DEVNULL, cwd=program.parent,
        env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"}, start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(limits.wall_seconds + _GRACE) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):  # nobody is left, unless the launcher hangs
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
