"""A view of the machine in which nothing of the user's can be changed, by Linux namespaces.

It needs no root: a process is free to do so in a user namespace of its own.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_dr.rl.sandbox import calls

FOLDER = "/tmp"  # all that can be written to
_ALSO = ("/var/tmp", "/dev/shm")  # the same folder
DEVICES = tuple(f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom"))
_NOBODY = 65534  # no user with powers, inside; outside it is the user


def leave(file_mib: int) -> None:
    """This process and its children to come have the view; its next child begins the processes.

    Args:
        file_mib: what the files of the folder may have together.

    Raises:
        OSError: the machine forbids it.
    """
    user, group = os.getuid(), os.getgid()
    _write("/proc/self/oom_score_adj", "1000")  # the first to go where memory is short
    os.unshare(
        os.CLONE_NEWUSER | os.CLONE_NEWNS | os.CLONE_NEWPID | os.CLONE_NEWNET | os.CLONE_NEWIPC
    )
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{_NOBODY} {user} 1")
    _write("/proc/self/gid_map", f"{_NOBODY} {group} 1")
    calls.mount("none", "/", "none", calls.MS_REC | calls.MS_PRIVATE)
    calls.make_read_only("/")
    with contextlib.ExitStack() as stack:
        kept = [(path, stack.enter_context(_held(path))) for path in _interpreter()]
        _devices()
        _private(file_mib)
        for path, held in kept:
            os.makedirs(path, exist_ok=True)
            calls.mount(held, path, "none", calls.MS_BIND | calls.MS_REC)


def show_processes() -> None:
    """/proc has the processes of this process's namespace alone; for the first one of it.

    Raises:
        OSError: the machine forbids it.
    """
    flags = calls.MS_RDONLY | calls.MS_NOSUID | calls.MS_NODEV | calls.MS_NOEXEC
    calls.mount("proc", "/proc", "proc", flags)  # /proc/sys is writable for root without powers


def _private(file_mib: int) -> None:
    """An empty /tmp, in other places too, and an empty /run: there lie sockets of the user's."""
    flags = calls.MS_NOSUID | calls.MS_NODEV
    options = f"size={file_mib}m,nr_inodes=4096,mode=700"
    calls.mount("tmpfs", FOLDER, "tmpfs", flags, options)
    for path in _ALSO:
        if os.path.isdir(path) and not os.path.samefile(path, FOLDER):
            calls.mount(FOLDER, path, "none", calls.MS_BIND)
    if os.path.isdir("/run") and not any(_within(p, "/run") for p in _prefixes()):
        options = "size=4k,nr_inodes=2,mode=755"
        calls.mount("tmpfs", "/run", "tmpfs", flags | calls.MS_RDONLY, options)


def _devices() -> None:
    """A /dev without disks and other devices that root may write to."""
    with contextlib.ExitStack() as stack:
        held = {path: stack.enter_context(_held(path)) for path in DEVICES}
        flags = calls.MS_NOSUID | calls.MS_NOEXEC
        calls.mount("tmpfs", "/dev", "tmpfs", flags, "size=4k,nr_inodes=32,mode=755")
        for path, source in held.items():
            _write(path, "")
            calls.mount(source, path, "none", calls.MS_BIND)
    os.mkdir("/dev/shm")
    os.symlink("/proc/self/fd", "/dev/fd")
    calls.mount("none", "/dev", "none", calls.MS_REMOUNT | calls.MS_BIND | calls.MS_RDONLY | flags)


def _interpreter() -> list[str]:
    """Folders of this Python that the private folder would hide."""
    hidden = (FOLDER, *_ALSO)
    return [p for p in _prefixes() if any(_within(p, place) for place in hidden)]


def _prefixes() -> set[str]:
    own = Path(sys.executable)
    found = {sys.base_prefix, sys.base_exec_prefix}
    found |= {str(p.parent.parent) for p in (own, own.resolve())}
    return {os.path.realpath(p) for p in found} | found


def _within(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(folder)


@contextlib.contextmanager
def _held(path: str) -> Iterator[str]:
    """A name of it that stays when something is mounted above."""
    number = os.open(path, os.O_PATH)
    try:
        yield f"/proc/self/fd/{number}"
    finally:
        os.close(number)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
