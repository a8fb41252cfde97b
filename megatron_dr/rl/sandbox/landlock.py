"""Files may be opened for writing in some places alone, by the kernel's Landlock.

A read-only view leaves out what is no file of its file system: named pipes, whose readers are the
user's programs.
"""

import ctypes
import os
import struct
from collections.abc import Sequence

from megatron_dr.rl.sandbox import calls

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # of all architectures
_VERSION, _LEAST = 1, 2  # the first version forbids to move files between folders
_PATH_BENEATH = 1
_WRITE_FILE, _REFER = 1 << 1, 1 << 13


def write_only_in(folder: str, files: Sequence[str]) -> None:
    """For this process and what it starts; nothing where the kernel is older than 5.19 or is built
    or booted without it.

    Raises:
        OSError: the kernel refuses.
    """
    if calls.syscall(_CREATE, None, 0, _VERSION) < _LEAST:
        return
    rules = _made(calls.syscall(_CREATE, struct.pack("Q", _WRITE_FILE | _REFER), 8, 0))
    try:
        for path in (folder, *files):
            allowed = _WRITE_FILE | _REFER if path == folder else _WRITE_FILE
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            _made(calls.syscall(_ADD, rules, _PATH_BENEATH, struct.pack("=Qi", allowed, place), 0))
            os.close(place)
        _made(calls.syscall(_RESTRICT, rules, 0))
    finally:
        os.close(rules)


def _made(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"landlock: {os.strerror(code)}")
    return result
