"""System calls that Python's standard library lacks."""

import ctypes
import os
import struct

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18

_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000  # of all architectures


def prctl(option: int, *values: object) -> None:
    """Raises:
    OSError: the kernel refuses.
    """
    words = [ctypes.c_ulong(v) if isinstance(v, int) else v for v in values]
    _done("prctl", _libc().prctl(option, *words, *[ctypes.c_ulong(0)] * (4 - len(words))))


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Raises:
    OSError: the kernel refuses.
    """
    names = (source.encode(), target.encode(), kind.encode())
    result = _libc().mount(*names, ctypes.c_ulong(flags), options.encode())
    _done(f"mount {target}", result)


def make_read_only(path: str) -> None:
    """A mount and all that is mounted below it.

    Raises:
        OSError: the kernel refuses; it is older than 5.12.
    """
    attributes = ctypes.create_string_buffer(struct.pack("QQQQ", MS_RDONLY, 0, 0, 0))
    result = syscall(_MOUNT_SETATTR, _AT_FDCWD, path.encode(), _AT_RECURSIVE, attributes, 32)
    _done("mount_setattr", result)


def syscall(number: int, *arguments: object) -> int:
    """By its number; what it gives, below 0 for an error that `ctypes.get_errno` tells."""
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return int(_libc().syscall(ctypes.c_long(number), *words))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _done(what: str, result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
