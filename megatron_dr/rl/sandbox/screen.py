"""A filter of the system calls that a program may make."""

import ctypes
import errno
import os
import resource
import socket
import struct

from megatron_dr.rl.sandbox import calls

_CLONE_NEWUSER = 0x10000000
_FILTER_MODE = 2
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000  # what a filter gives
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _GIVE = 0x20, 0x15, 0x35, 0x45, 0x06  # its instructions
_NUMBER, _ARCHITECTURE = 0, 4  # where they stand in what it reads
_FIRST, _SECOND, _THIRD = 16, 24, 32  # arguments of 8 bytes, the lower half first
_OTHER_ABI = 0x40000000  # x86's x32 has the same calls by other numbers
_NEWEST = 462  # later calls nobody has looked at
_FAMILIES = (socket.AF_INET, socket.AF_INET6)  # those of the network namespace, which has none
_BUFFERS = (socket.SO_SNDBUF, socket.SO_RCVBUF, 32, 33)  # the last two SO_*BUFFORCE
_F_SETPIPE_SZ = 1031

# by machine: its number, and where it stands in the rows below
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_LOOKED_INTO = {
    "clone": (56, 220), "socket": (41, 198), "socketpair": (53, 199), "setsockopt": (54, 208),
    "fcntl": (72, 25), "prlimit64": (302, 261), "setrlimit": (160, 164),
}  # fmt: skip
_LACKING = (435,)  # clone3, whose flags can't be looked at: libraries go back to clone
_DENIED = {
    # namespaces, mounts and files without a path
    "unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51), "pivot_root": (155, 41),
    "mount": (165, 40), "umount2": (166, 39), "mount_setattr": (442, 442),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    # memory that no process has mapped, so that no limit counts it
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    # the user's keys, which the kernel hands on to all that the user starts
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # other processes' memory and files
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "pidfd_getfd": (438, 438), "kcmp": (312, 272),
    # large parts of the kernel that no test needs, and its administration
    "bpf": (321, 280), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "syslog": (103, 116), "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294),
}  # fmt: skip
Step = tuple[int, str, str, int]  # an instruction: code, where to if so, where to if not, operand


def forbid_some() -> None:
    """This process and what it starts get EPERM for the calls that are denied above, for clone with
    a user namespace, for other processes' limits and that of dumps, for larger buffers of sockets
    and pipes, and for sockets that no network namespace holds: programs of the user's listen on
    some that have names, and virtual machines' hosts on others. Calls newer than the table are
    lacking; one by another architecture's numbers ends the process.

    Raises:
        OSError: no table for this machine, or the kernel refuses.
    """
    code = _filter(os.uname().machine)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    calls.prctl(
        calls.PR_SET_SECCOMP, _FILTER_MODE, ctypes.create_string_buffer(program, len(program))
    )


def _filter(machine: str) -> bytes:
    """In the bytes of classic BPF."""
    if machine not in _MACHINES:
        raise OSError(errno.ENOSYS, f"no table of system calls for {machine}")
    number, place = _MACHINES[machine]
    return _assembled({
        "": [(_LOAD, "", "", _ARCHITECTURE), (_EQUAL, "", "kill", number),
             (_LOAD, "", "", _NUMBER), (_AT_LEAST, "deny", "", _OTHER_ABI),
             (_AT_LEAST, "lack", "", _NEWEST + 1),
             *((_EQUAL, "lack", "", call) for call in _LACKING),
             *((_EQUAL, "deny", "", row[place]) for row in _DENIED.values()),
             *((_EQUAL, name, "", row[place]) for name, row in _LOOKED_INTO.items()),
             (_GIVE, "", "", _ALLOW)],
        "clone": [(_LOAD, "", "", _FIRST), (_ANY_BIT, "deny", "allow", _CLONE_NEWUSER)],
        "socket": [(_LOAD, "", "", _FIRST),
                   *((_EQUAL, "allow", "", family) for family in _FAMILIES),
                   (_GIVE, "", "", _ERRNO | errno.EPERM)],
        # a stream's ends stay connected; others can send to sockets that have names
        "socketpair": [(_LOAD, "", "", _SECOND), (_ANY_BIT, "deny", "", 0xE),
                       (_ANY_BIT, "allow", "deny", socket.SOCK_STREAM)],
        # what is unread is memory
        "setsockopt": [(_LOAD, "", "", _SECOND), (_EQUAL, "", "allow", socket.SOL_SOCKET),
                       (_LOAD, "", "", _THIRD),
                       *((_EQUAL, "deny", "", kind) for kind in _BUFFERS),
                       (_GIVE, "", "", _ALLOW)],
        "fcntl": [(_LOAD, "", "", _SECOND), (_EQUAL, "deny", "allow", _F_SETPIPE_SZ)],
        "prlimit64": [(_LOAD, "", "", _FIRST), (_EQUAL, "", "deny", 0),  # the process's own
                      (_LOAD, "", "", _SECOND), (_EQUAL, "", "allow", resource.RLIMIT_CORE),
                      (_LOAD, "", "", _THIRD), (_EQUAL, "", "deny", 0),  # to read it is allowed
                      (_LOAD, "", "", _THIRD + 4), (_EQUAL, "allow", "deny", 0)],
        "setrlimit": [(_LOAD, "", "", _FIRST), (_EQUAL, "deny", "allow", resource.RLIMIT_CORE)],
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
