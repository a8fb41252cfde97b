"""Escapes that the sandbox refuses, each by the error that it gets; and the world after them."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megatron_dr.rl.sandbox import calls

from ._attempts import INT80, KINDS
from ._observed import inside, needs_namespaces

pytestmark = needs_namespaces
CASES = [(kind, name) for kind, table in KINDS.items() for name in table]
KEY = "hf_of-the-parent"


class World(NamedTuple):
    """What the attempts got, and what is seen from outside."""

    got: dict[str, str]
    process: dict[str, str]
    before: dict[str, Any]
    after: dict[str, Any]
    heard: list[str]


@pytest.fixture(scope="module")
def outside() -> Iterator[Path]:
    """A folder of the user's, in no place that the sandbox hides."""
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
        path = Path(folder)
        (path / "checkpoint").write_text("weights")
        (path / "target.jsonl").write_text("data\n")
        powers = shutil.copy("/usr/bin/id", path / "powers")
        if os.getuid() == 0:
            path.chmod(0o755)
            os.chown(powers, 1, 1)
        os.chmod(powers, 0o6755)
        os.mkfifo(path / "pipe")
        yield path


@pytest.fixture(scope="module")
def world(outside: Path) -> Iterator[World]:
    """All attempts in one sandbox, between two looks at what they aim at."""
    with pytest.MonkeyPatch.context() as patch, listening(outside) as (sockets, given):
        patch.setenv("HF_TOKEN", KEY)
        reader = os.open(outside / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        before = seen(outside)
        attempts = {
            f"{kind}: {name}": KINDS[kind][name][0] for kind, name in CASES
        }  # fmt: skip
        where = {"outside": str(outside), "parent": os.getpid(), **given}
        with inside(attempts, **where) as (got, process):
            names = ("status", "limits", "environ", "mountinfo", "cmdline")
            facts = {name: (process / name).read_text() for name in names}
            facts["fd"] = " ".join(os.readlink(path) for path in (process / "fd").iterdir())
            for kind in ("user", "net", "pid", "mnt", "ipc"):
                facts[f"ns/{kind}"] = os.readlink(process / "ns" / kind)
            facts["session"] = (process / "stat").read_text().rpartition(")")[2].split()[3]
            facts["processes"] = " ".join(os.listdir(process / "root" / "proc"))
            facts["/run"] = " ".join(os.listdir(process / "root" / "run"))
        said = [*heard(sockets), *([str(data)] if (data := os.read(reader, 10)) else [])]
        os.close(reader)
        yield World(got, facts, before, seen(outside), said)


class listening:
    """Sockets of the user's that a program may try to reach."""

    def __init__(self, outside: Path) -> None:
        self._outside, self._sockets = outside, list[socket.socket]()

    def __enter__(self) -> tuple[list[socket.socket], dict[str, Any]]:
        tcp = socket.create_server(("127.0.0.1", 0))
        port, abstract = tcp.getsockname()[1], f"\0escape{os.getpid()}"
        self._sockets.append(tcp)
        for kind, place in (
            (socket.SOCK_STREAM, str(self._outside / "stream")), (socket.SOCK_STREAM, abstract),
            (socket.SOCK_DGRAM, str(self._outside / "datagram")),
        ):  # fmt: skip
            made = socket.socket(socket.AF_UNIX, kind)
            made.bind(place)
            if kind == socket.SOCK_STREAM:
                made.listen()
            self._sockets.append(made)
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", port))
        self._sockets.append(udp)
        return self._sockets, {"port": port, "abstract": abstract}

    def __exit__(self, *_: object) -> None:
        for made in self._sockets:
            made.close()
        for name in ("stream", "datagram"):
            (self._outside / name).unlink(missing_ok=True)


def heard(sockets: list[socket.socket]) -> Iterator[str]:
    """What came in on them."""
    for made in sockets:
        made.setblocking(False)
        try:
            yield str(made.accept() if made.type == socket.SOCK_STREAM else made.recv(10))
        except BlockingIOError:
            continue


def seen(outside: Path) -> dict[str, Any]:
    """What must not change: files with their modes and times, and things of the machine."""
    places = [outside, Path("/"), Path("/usr"), Path("/etc"), Path("/dev/null")]
    found: dict[str, Any] = {str(p): (p.stat().st_mode, p.stat().st_uid) for p in places}
    for path in outside.iterdir():
        about = path.lstat()
        said = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (about.st_mode, about.st_mtime, about.st_nlink, said)
    for path in map(Path, ("/", "/usr", "/etc")):
        found[f"in {path}"] = sorted(os.listdir(path))
    for name in ("vm/swappiness", "kernel/hostname", "kernel/core_pattern"):
        found[name] = Path("/proc/sys", name).read_text()
    found["shared memory"] = [line.split()[0] for line in open("/proc/sysvipc/shm")]
    found["keys"] = sum("kept" in line for line in open("/proc/keys"))
    return found


@pytest.mark.parametrize("kind, name", CASES)
def test_refused(world: World, kind: str, name: str) -> None:
    attempt, wanted = KINDS[kind][name]
    if attempt == INT80 and os.uname().machine != "x86_64":
        pytest.skip("no such call")
    if name == "named pipe" and calls.syscall(444, None, 0, 1) < 2:
        pytest.skip("this kernel has no Landlock, or an early one")
    got = world.got[f"{kind}: {name}"]
    assert got == wanted or got in wanted.split()


def test_nothing_outside_is_changed_or_reached(world: World) -> None:
    assert world.after == world.before
    assert world.heard == []
    assert not any(KEY in text for text in (*world.got.values(), *world.process.values()))


def test_the_program_as_it_is_seen_from_outside(world: World) -> None:
    """By the kernel's own account of it."""
    status = dict(line.split(":\t", 1) for line in world.process["status"].splitlines())
    assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Amb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"
    for name, text in world.process.items():
        if name.startswith("ns/"):
            assert text != os.readlink(f"/proc/self/{name}")
    limits = dict((line[:26].strip(), line[26:].split()) for line in
                  world.process["limits"].splitlines())  # fmt: skip
    assert limits["Max core file size"][:2] == ["1", "1"]
    assert limits["Max open files"][:2] == ["128", "128"]
    assert limits["Max address space"][:2] == [str(1024 << 20)] * 2
    assert "HOME" not in world.process["environ"]
    open_files = world.process["fd"].split()
    assert sorted(f.partition(":")[0].removesuffix(" (deleted)") for f in open_files
                  if f != "(deleted)") == ["/dev/null"] * 3 + ["/tmp/tests", "pipe"]  # fmt: skip
    assert sorted(p for p in world.process["processes"].split() if p.isdigit()) == ["1", "2"]
    assert world.process["session"] == "2" or int(world.process["session"]) > 0
    assert world.process["/run"] == ""


def test_only_the_private_folder_can_be_written_to(world: World) -> None:
    """By the table of its mounts: device files are read-only too, which leaves what they do."""
    writable = set()
    for line in world.process["mountinfo"].splitlines():
        place, options = line.split()[4:6]
        if "rw" in options.split(","):
            writable.add(place)
    assert writable <= {"/tmp", "/var/tmp", "/dev/shm"}, writable
