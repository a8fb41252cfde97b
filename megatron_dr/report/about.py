"""What a run is, for the first line of its metrics: flags, versions, sources, hardware.

Nothing secret is in it: see `hidden`.
"""

import contextlib
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from megatron_dr.report.hidden import flags

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "numpy", "triton", "transformers")
_SECONDS = 5  # for git


def of(argv: Sequence[str], more: dict[str, Any]) -> dict[str, Any]:
    """Of this process and its command line, as JSON can have it.

    Args:
        more: what only the run knows.
    """
    return {
        "program": Path(argv[0]).name if argv else "",
        "flags": flags(argv[1:]),
        "folder": os.getcwd(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "git": git(Path(argv[0]).parent if argv else Path()),
        "machine": machine(),
        "process": process(),
        **more,
    }


def versions() -> dict[str, str]:
    """Of Python and of what is installed of the packages that matter, ours among them."""
    from megatron_dr.version import VERSION

    found = {"megatron_dr": VERSION, "python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git(folder: Path) -> dict[str, Any] | None:
    """Commit of the script's repository, or else of the folder that the run was started in, and
    whether files differ from it; None where there is no repository, or no git."""
    for place in dict.fromkeys((folder.resolve(), Path.cwd())):
        commit = _git(place, "rev-parse", "HEAD")
        if commit is not None:
            changed = _git(place, "status", "--porcelain", "--untracked-files=no")
            return {"commit": commit, "changed": None if changed is None else bool(changed)}
    return None


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *words], capture_output=True,
            text=True, errors="replace", timeout=_SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine() -> dict[str, Any]:
    """Of this process's node."""
    return {
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory bytes": psutil.virtual_memory().total,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        named = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        if named:
            return named[1].strip()
    return platform.processor()


def process() -> dict[str, Any]:
    """By which this process is found again, from where its number means the same."""
    return {**place(), "pid": os.getpid(), "created": created(os.getpid())}


def place() -> dict[str, str | None]:
    """Where numbers of processes are told apart: a host, and on it a container."""
    space = None
    with contextlib.suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "space": space}


def created(pid: int) -> float | None:
    """When a process began, which tells it from a later one of its number; None: it is gone."""
    try:
        found = psutil.Process(pid)
        return None if found.status() == psutil.STATUS_ZOMBIE else float(found.create_time())
    except (psutil.Error, ValueError, OverflowError):  # or it is no process's number
        return None
