"""Escapes by one step each: what is tried in the sandbox, and what it must get.

A wanted error is a name or several of them; a mistake in an attempt is none of these. `outside` is
a folder of the user's, with other names that the test gives.
"""

_DEAD = """
code = {bytes!r}
import mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(code)
at = ctypes.addressof(ctypes.c_char.from_buffer(page))
got = ctypes.CFUNCTYPE(ctypes.c_long)(at)()
"""
# mov eax, 20 (getpid of i386); int 0x80; ret
INT80 = _DEAD.format(bytes=b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")

READ_ONLY = "EROFS"
HIDDEN = "ENOENT"
DENIED = "EPERM"

FILES = {
    "write to /": ("open('/new', 'w')", "EROFS EACCES"),
    "write to /usr": ("open('/usr/new', 'w')", "EROFS EACCES"),
    "write to /etc": ("open('/etc/new', 'w')", "EROFS EACCES"),
    "write to /proc/sys": ("open('/proc/sys/vm/swappiness', 'w')", "EROFS EACCES"),
    "write to /sys": ("open('/sys/kernel/mm/transparent_hugepage/enabled', 'w')",
                      "EROFS EACCES ENOENT"),
    "sysrq": ("open('/proc/sysrq-trigger', 'w')", "EROFS EACCES ENOENT"),
    "be the last to be killed": ("open('/proc/self/oom_score_adj', 'w')", "EROFS"),
    "new file": ("open(f'{outside}/new', 'w')", "EROFS"),
    "append": ("open(f'{outside}/target.jsonl', 'a')", "EROFS"),
    "read and write": ("open(f'{outside}/target.jsonl', 'r+')", "EROFS"),
    "unlink": ("os.unlink(f'{outside}/checkpoint')", "EROFS"),
    "rename": ("os.rename(f'{outside}/checkpoint', f'{outside}/moved')", "EROFS"),
    "move out of it": ("os.rename('/tmp/program.py', f'{outside}/moved')", "EXDEV"),
    "chmod": ("os.chmod(f'{outside}/checkpoint', 0)", "EROFS"),
    "truncate": ("os.truncate(f'{outside}/target.jsonl', 0)", "EROFS"),
    "times": ("os.utime(f'{outside}/checkpoint', (0, 0))", "EROFS"),
    "attribute": ("os.setxattr(f'{outside}/checkpoint', 'user.a', b'b')", "EROFS"),
    "folder": ("os.makedirs(f'{outside}/folder')", "EROFS"),
    "symbolic link": ("os.symlink('/', f'{outside}/link')", "EROFS"),
    "through a link of its own": (
        "os.symlink(f'{outside}/target.jsonl', '/tmp/mine'); open('/tmp/mine', 'a')", "EROFS"),
    "hard link in": ("os.link(f'{outside}/checkpoint', '/tmp/hard')", "EXDEV"),
    "hard link out": ("os.link('/tmp/program.py', f'{outside}/hard')", "EROFS EXDEV"),
    "named pipe": ("os.open(f'{outside}/pipe', os.O_WRONLY | os.O_NONBLOCK)", "EACCES"),
    "file without a name": ("os.open(outside, os.O_TMPFILE | os.O_RDWR)", "EROFS"),
    "upwards": ("open('/tmp/../new', 'w')", "EROFS EACCES"),
    "by its descriptors": ("os.chdir('/'); open('/proc/self/cwd/new', 'w')", "EROFS EACCES"),
    "device": ("os.mknod('/tmp/disk', 0o60600, os.makedev(8, 0))", DENIED),
    "chmod of a device": ("os.chmod('/dev/null', 0)", "EROFS"),
    "another in /dev": ("open('/dev/new', 'w')", "EROFS"),
    "memory of the machine": ("open('/dev/mem', 'rb')", HIDDEN),
    "memory of the kernel": ("open('/proc/kcore', 'rb')", "EPERM EACCES ENOENT"),
    "messages of the kernel": ("open('/proc/kmsg', 'rb')", "EPERM EACCES ENOENT"),
    "kernel's log": ("open('/dev/kmsg')", HIDDEN),
    "fuse": ("open('/dev/fuse', 'r+b')", HIDDEN),
    "virtual machines": ("open('/dev/kvm', 'r+b')", HIDDEN),
    "GPU": ("open('/dev/nvidiactl', 'r+b')", HIDDEN),
    "terminal": ("open('/dev/tty', 'r+b')", HIDDEN),
    "type into a terminal": ("import fcntl, termios; fcntl.ioctl(0, termios.TIOCSTI, b'x')",
                             "ENOTTY"),
    "file by its handle": ("call((304, 265), -100, b'\\0' * 16, 0)", DENIED),
    "all files' events": ("call((300, 262), 0, 0)", DENIED),
}  # fmt: skip

PROCESSES = {
    "keys of the first process": ("got = open('/proc/1/environ').read()", "EACCES"),
    "its memory": ("open('/proc/1/mem', 'r+b')", "EROFS EACCES"),
    "its maps": ("open('/proc/1/maps')", "EACCES"),
    "its answer": ("os.open('/proc/1/fd/1', os.O_WRONLY)", "EACCES"),
    "its view": ("os.listdir('/proc/1/root/')", "EACCES"),
    "its namespaces": ("os.open('/proc/1/ns/mnt', os.O_RDONLY)", "EACCES"),
    "the parent's keys": ("got = open(f'/proc/{parent}/environ').read()", HIDDEN),
    "kill the parent": ("os.kill(parent, 9)", "ESRCH"),
    "hold the parent": ("os.pidfd_open(parent)", "ESRCH EINVAL"),
    "kill the first": ("os.kill(1, 9)", "done: None"),  # and nothing comes of it
    "stop the first": ("os.kill(1, 19)", "done: None"),
    "kill all": ("for pid in range(parent, parent + 3): os.kill(pid, 9)", "ESRCH"),
    "ptrace": ("call((101, 117), 16, 1, 0, 0)", DENIED),
    "ptrace of a child": ("call((101, 117), 0, 0, 0, 0)", DENIED),
    "read another's memory": ("call((310, 270), 1, None, 0, None, 0, 0)", DENIED),
    "write another's memory": ("call((311, 271), 1, None, 0, None, 0, 0)", DENIED),
    "take another's file": ("call(438, os.pidfd_open(1), 0, 0)", DENIED),
    "compare with another": ("call((312, 272), 1, os.getpid(), 0, 0, 0)", DENIED),
    "limits of the first": (
        "import resource; resource.prlimit(1, resource.RLIMIT_NOFILE, (3, 3))", DENIED),
    "slow the first": ("os.setpriority(os.PRIO_PROCESS, 1, 19)", "EPERM EACCES"),
    "starve the first": ("os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0))", DENIED),
    "move the first": ("os.sched_setaffinity(1, {0})", DENIED),
    "hasten itself": ("os.setpriority(os.PRIO_PROCESS, 0, -5)", "EACCES EPERM"),
    "real time": ("os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(9))", DENIED),
    "more files": ("call((160, 164), 7, struct.pack('QQ', 9999, 9999))", DENIED),
    "more memory": ("call((302, 261), 0, 9, struct.pack('QQ', 1 << 40, 1 << 40), None)", DENIED),
    "a dump": ("call((160, 164), 4, struct.pack('QQ', 0, 0))", DENIED),
    "a dump, too": ("call((302, 261), 0, 4, struct.pack('QQ', 0, 0), None)", DENIED),
    "new privileges": ("call((157, 167), 38, 0, 0, 0, 0)", "EINVAL"),
    "root": ("os.setresuid(0, 0, 0)", "EINVAL EPERM"),
    "groups": ("os.setgroups([0])", DENIED),
    "powers": ("call((126, 91), struct.pack('II', 0x20080522, 0), struct.pack('I', 1 << 21) * 6)",
               DENIED),
    "a program with powers": (
        "got = subprocess.run([f'{outside}/powers', '-u'], capture_output=True, text=True).stdout",
        "done: 65534\n"),
}  # fmt: skip

KERNEL = {
    "unshare": ("os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNS)", DENIED),
    "clone": ("call((56, 220), 0x10000000 | 17, 0, 0, 0, 0)", DENIED),
    "clone3": ("call(435, struct.pack('Q', 0x10000000) + bytes(56), 64)", "ENOSYS"),
    "setns": ("os.setns(os.open('/proc/self/ns/net', os.O_RDONLY), 0)", DENIED),
    "mount": ("call((165, 40), b'none', b'/', b'none', 32 | 4096, b'')", DENIED),
    "umount": ("call((166, 39), b'/tmp', 2)", DENIED),
    "pivot_root": ("call((155, 41), b'/tmp', b'/tmp')", DENIED),
    "chroot": ("os.chroot('/tmp')", DENIED),
    "fsopen": ("call(430, b'tmpfs', 0)", DENIED),
    "open_tree": ("call(428, -100, b'/', 1)", DENIED),
    "move_mount": ("call(429, -100, b'/tmp', -100, b'/', 0)", DENIED),
    "mount_setattr": ("call(442, -100, b'/', 0x8000, bytes(32), 32)", DENIED),
    "bpf": ("call((321, 280), 0, bytes(128), 128)", DENIED),
    "perf_event_open": ("call((298, 241), bytes(120), 0, -1, -1, 0)", DENIED),
    "userfaultfd": ("call((323, 282), 1)", DENIED),
    "io_uring": ("call(425, 8, bytes(120))", DENIED),
    "keyctl": ("call((250, 219), 0, -3, 0)", DENIED),
    "add_key": ("call((248, 217), b'user', b'kept', b'x', 1, -4)", DENIED),
    "request_key": ("call((249, 218), b'user', b'kept', None, -4)", DENIED),
    "memfd_create": ("os.memfd_create('unseen')", DENIED),
    "memfd_secret": ("call(447, 0)", DENIED),
    "shared memory": ("call((29, 194), 0x5EED, 4096, 0o1600)", DENIED),
    "semaphores": ("call((64, 190), 0, 32000, 0o1600)", DENIED),
    "messages": ("call((68, 186), 0, 0o1600)", DENIED),
    "POSIX messages": ("call((240, 180), b'kept', 0o102, 0o600, None)", DENIED),
    "syslog": ("call((103, 116), 3, bytes(64), 64)", DENIED),
    "module": ("call((175, 105), b'', 0, b'')", DENIED),
    "kexec": ("call((246, 104), 0, 0, 0, 0)", DENIED),
    "reboot": ("call((169, 142), 0xfee1dead, 672274793, 0, 0)", DENIED),
    "swap": ("call((168, 225), b'/swap')", DENIED),
    "name of the machine": ("call((170, 161), b'x', 1)", DENIED),
    "clock": ("time.clock_settime(time.CLOCK_REALTIME, 0.0)", DENIED),
    "without the filter": ("call((157, 167), 22, 0, 0, 0, 0)", "EINVAL"),
    "another filter": ("call((317, 277), 0, 0, None)", "EINVAL"),  # strict
    "x32": ("call(0x40000000 + 39)", DENIED),
    "later calls": ("call(467, 0, 0, 0, 0, 0)", "ENOSYS"),
    "32 bits": (INT80, "SIGSYS"),
}  # fmt: skip

NETWORK = {
    "TCP": ("socket.create_connection(('127.0.0.1', port), 1)", "ENETUNREACH"),
    "UDP": ("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', port))",
            "ENETUNREACH"),
    "IPv6": ("socket.create_connection(('::1', port), 1)",
             "ENETUNREACH EADDRNOTAVAIL EAFNOSUPPORT"),
    "another machine": ("socket.create_connection(('192.0.2.1', 80), 1)", "ENETUNREACH"),
    "its own": ("socket.create_connection(socket.create_server(('127.0.0.1', 0)).getsockname(), 1)",
                "ENETUNREACH"),
    "raw": ("socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)", DENIED),
    "packets": ("socket.socket(socket.AF_PACKET, socket.SOCK_RAW)", DENIED),
    "unix": ("socket.socket(socket.AF_UNIX).connect(f'{outside}/stream')", DENIED),
    "abstract": ("socket.socket(socket.AF_UNIX).connect(abstract)", DENIED),
    "unix by one of a pair": (
        "socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'x', f'{outside}/datagram')", DENIED),
    "unix by one of a stream": (
        "socket.socketpair()[0].connect(f'{outside}/stream')", "EISCONN EINVAL"),
    "unix by a packet's": ("socket.socketpair(type=socket.SOCK_SEQPACKET)", DENIED),
    "netlink": ("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", DENIED),
    "vsock": ("socket.socket(socket.AF_VSOCK)", DENIED),
    "kernel's ciphers": ("socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)", DENIED),
    "bluetooth": ("socket.socket(31, socket.SOCK_RAW)", DENIED),
    "large pipes": ("import fcntl; fcntl.fcntl(os.pipe()[1], 1031, 1 << 20)", DENIED),
    "large buffers": (
        "socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 24)", DENIED),
}  # fmt: skip

KINDS = {"files": FILES, "processes": PROCESSES, "kernel": KERNEL, "network": NETWORK}
