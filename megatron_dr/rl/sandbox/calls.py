"""System calls that Python's standard library lacks, and a filter of those a program may make."""

import ctypes
import errno
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
_CLONE_NEWUSER = 0x10000000
_FILTER_MODE = 2
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000  # what a filter gives
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _GIVE = 0x20, 0x15, 0x35, 0x45, 0x06  # its instructions
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # where they stand in what it reads
_OTHER_ABI = 0x40000000  # x86's x32 has the same calls by other numbers

_FAMILIES = (2, 10, 16)  # AF_INET, AF_INET6, AF_NETLINK: those of the network namespace

# by machine: its number; clone; socket; then what gives namespaces, memory without a mapping, or
# both: memfd_create, memfd_secret, shmget, unshare, setns, io_uring_setup, add_key, bpf
_MACHINES = {
    "x86_64": (0xC000003E, 56, 41, (319, 447, 29, 272, 308, 425, 248, 321)),
    "aarch64": (0xC00000B7, 220, 198, (279, 447, 194, 97, 268, 425, 217, 280)),
}
_CLONE3 = 435
Step = tuple[int, str, str, int]  # an instruction: code, where to if so, where to if not, operand


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
    result = _libc().syscall(
        ctypes.c_long(_MOUNT_SETATTR), ctypes.c_long(_AT_FDCWD), path.encode(),
        ctypes.c_long(_AT_RECURSIVE), attributes, ctypes.c_long(32),
    )  # fmt: skip
    _done("mount_setattr", result)


def forbid_some() -> None:
    """This process and what it starts get EPERM for the calls of the table above, for clone with a
    user namespace, and for sockets that no network namespace holds: programs of the user's listen
    on some that have names, and virtual machines' hosts on others.

    Raises:
        OSError: no table for this machine, or the kernel refuses.
    """
    code = _filter(os.uname().machine)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    prctl(PR_SET_SECCOMP, _FILTER_MODE, ctypes.create_string_buffer(program, len(program)))


def _filter(machine: str) -> bytes:
    """In the bytes of classic BPF."""
    if machine not in _MACHINES:
        raise OSError(errno.ENOSYS, f"no table of system calls for {machine}")
    number, clone, socket, denied = _MACHINES[machine]
    return _assembled({
        "": [(_LOAD, "", "", _ARCHITECTURE), (_EQUAL, "", "kill", number),
             (_LOAD, "", "", _NUMBER), (_AT_LEAST, "deny", "", _OTHER_ABI),
             *((_EQUAL, "deny", "", call) for call in denied),
             # its flags can't be looked at: libraries go back to clone
             (_EQUAL, "lack", "", _CLONE3), (_EQUAL, "clone", "", clone),
             (_EQUAL, "socket", "allow", socket)],
        "clone": [(_LOAD, "", "", _FIRST_ARGUMENT), (_ANY_BIT, "deny", "allow", _CLONE_NEWUSER)],
        "socket": [(_LOAD, "", "", _FIRST_ARGUMENT),
                   *((_EQUAL, "allow", "", family) for family in _FAMILIES)],
        "deny": [(_GIVE, "", "", _ERRNO | errno.EPERM)],
        "lack": [(_GIVE, "", "", _ERRNO | errno.ENOSYS)],
        "kill": [(_GIVE, "", "", _KILL)],
        "allow": [(_GIVE, "", "", _ALLOW)],
    })  # fmt: skip


def _assembled(parts: dict[str, list[Step]]) -> bytes:
    """Parts one after the other; an instruction goes to a part, or with no name to what follows."""
    starts, steps = {}, list[Step]()
    for name, part in parts.items():
        starts[name] = len(steps)
        steps += part
    code = b""
    for place, (kind, so, otherwise, operand) in enumerate(steps):
        jumps = (starts[name] - place - 1 if name else 0 for name in (so, otherwise))
        code += struct.pack("HBBI", kind, *jumps, operand)
    return code


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _done(what: str, result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
