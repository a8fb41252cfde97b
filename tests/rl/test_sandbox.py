"""The sandbox that runs models' code."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_dr.rl import sandbox
from megatron_dr.rl.sandbox import Limits, passes

QUICK = Limits(wall_seconds=1.5, cpu_seconds=1)
PATIENT = Limits(wall_seconds=60.0, cpu_seconds=30)  # for what passes on a busy machine


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import sys; sys.exit(0)", id="exit"),
        pytest.param("import os; os._exit(0)", id="_exit"),
        pytest.param("while True: pass", id="loop"),
        pytest.param("import time; time.sleep(60)", id="sleep"),
        pytest.param("x = bytearray(2 << 30)", id="memory"),
        pytest.param("open('big', 'wb').write(bytes(32 << 20))", id="file"),
        pytest.param("def", id="syntax"),
        pytest.param("\x00\ud800", id="bytes"),
    ],
)
def test_code_that_does_not_reach_the_end_fails(code: str) -> None:
    began = time.monotonic()
    assert not passes(code, "", QUICK)
    assert time.monotonic() - began < 60


def test_code_may_print() -> None:
    code = "print('a'); import atexit; atexit.register(print, 'b')"
    assert passes(code, "print('c')", PATIENT)


def test_code_runs_in_its_own_folder_with_an_empty_environment() -> None:
    code = "import os; here = os.getcwd(); open('a', 'w').write('b')"
    assert passes(code, f"assert here != {str(Path.cwd())!r} and 'HOME' not in os.environ")


CAN = """
import os
os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET | os.CLONE_NEWPID | os.CLONE_NEWNS)
"""
apart = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", CAN], capture_output=True).returncode != 0,
    reason="this kernel forbids user namespaces",
)


@pytest.fixture
def outside() -> Iterator[Path]:
    """A folder of the user's, in no place that the sandbox hides."""
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
        Path(folder, "checkpoint").write_text("weights")
        Path(folder, "target.jsonl").write_text("data\n")
        yield Path(folder)


FORBIDDEN = [
    "os.unlink(f'{outside}/checkpoint')",
    "open(f'{outside}/target.jsonl', 'a').write('poison')",
    "open(f'{outside}/new', 'w')",
    "os.rename(f'{outside}/checkpoint', f'{outside}/moved')",
    "os.chmod(f'{outside}/checkpoint', 0)",
    "os.truncate(f'{outside}/target.jsonl', 0)",
    "os.makedirs(f'{outside}/folder')",
    "os.symlink('/', f'{outside}/link')",
    "open('/proc/sys/vm/swappiness', 'w')",
    "open('/proc/self/oom_score_adj', 'w')",
    "open('/dev/new', 'w')",
    "call('mount', b'none', b'/', b'none', 32 | 4096, b'')",
    "call('umount2', b'/tmp', 2)",
    "call('shmget', 0, 1 << 20, 0o1600)",
    "os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNS)",
    "os.memfd_create('unseen')",
    "socket.socket(socket.AF_UNIX).connect(f'{outside}/listening')",
    "socket.socket(socket.AF_VSOCK)",
    "socket.create_connection(socket.create_server(('127.0.0.1', 0)).getsockname(), 1)",
]
TRYING = """
import ctypes, os, socket
def call(name, *arguments):
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
done = []
for attempt in forbidden:
    try:
        exec(attempt)
    except OSError:
        continue
    done.append(attempt)
assert not done, done
assert open(f"{outside}/target.jsonl").read() == "data\\n"
assert not os.listdir("/run") and len([p for p in os.listdir("/proc") if p.isdigit()]) == 2
os.kill(1, 9)  # who watches does not hear it
"""


@apart
def test_code_can_change_nothing_of_the_users(outside: Path) -> None:
    """It can read; there is no network, and no process but its own and the one that watches."""
    given = f"outside = {str(outside)!r}\nforbidden = {FORBIDDEN!r}\n"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(outside / "listening"))
        listening.listen()
        assert passes(given + TRYING, "", PATIENT)
    (outside / "listening").unlink()
    assert {path.name: path.read_text() for path in outside.iterdir()} == {
        "checkpoint": "weights", "target.jsonl": "data\n",
    }  # fmt: skip


@apart
def test_places_for_temporary_files_are_one_private_folder() -> None:
    code = """
import asyncio, multiprocessing, os, subprocess, tempfile, threading
for name in ("/tmp/a", "/var/tmp/b", "/dev/shm/c", "d"):
    open(name, "w").write("x")
assert {"a", "b", "c", "d"} < set(os.listdir("/tmp")) and not os.path.exists(OUTSIDE)
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(abs, [-1, 2]) == [1, 2]
asyncio.run(asyncio.sleep(0))
threading.Thread(target=print).start()
assert subprocess.run(["true"]).returncode == 0
assert len(os.urandom(3)) == 3 and open("/dev/null", "w").write("x")
print("said", tempfile.mkdtemp())
"""
    with tempfile.NamedTemporaryFile(dir="/tmp") as file:
        assert passes(f"OUTSIDE = {file.name!r}\n{code}", "", PATIENT)
    assert not Path("/tmp/program.py").exists()


HOGS = {
    "memory": """
for _ in range(4):
    if os.fork() == 0:
        x = bytearray(b"1") * (60 << 20)
        time.sleep(60)
time.sleep(60)
""",
    "files": """
for n in range(9):
    open(f"/tmp/{n}", "wb").write(bytes(1 << 20))
""",
    "processes": """
for _ in range(20):
    if os.fork() == 0:
        time.sleep(60)
time.sleep(60)
""",
}


@apart
@pytest.mark.parametrize("kind", HOGS)
def test_limits_are_those_of_all_processes_together(kind: str) -> None:
    """Each of them alone is far below."""
    limits = Limits(60.0, 30, memory_mib=150, file_mib=8, processes=12)
    began = time.monotonic()
    assert not passes("import os, time\n" + HOGS[kind], "", limits)
    assert time.monotonic() - began < 50


@apart
def test_what_processes_share_counts_once() -> None:
    code = """
import os, time
x = bytearray(b"1") * (60 << 20)
for _ in range(6):
    if os.fork() == 0:
        time.sleep(0.2)
        os._exit(0)
for _ in range(6):
    os.wait()
"""
    assert passes(code, "", Limits(60.0, 30, memory_mib=150))


def without(*names: str) -> str:
    """What boots a launcher on a kernel that forbids these, of the launcher's or of `os`."""
    return "".join(f"""
import os
from megatron_dr.rl.sandbox import calls
def forbidden(*_):
    raise PermissionError("{name}: forbidden")
{name} = forbidden
""" for name in names)  # fmt: skip


def forbidding(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    first, rest = sandbox._BOOT.split("\n", 1)
    monkeypatch.setattr(sandbox, "_BOOT", f"{first}\n{without(*names)}\n{rest}")


@pytest.mark.parametrize("name", ["os.unshare", "calls.mount", "calls.make_read_only",
                                  "calls.forbid_some"])  # fmt: skip
def test_a_machine_that_cant_keep_code_apart_does_not_run_it(
    name: str, monkeypatch: pytest.MonkeyPatch, outside: Path
) -> None:
    forbidding(monkeypatch, name)
    code = f"import os; os.unlink({str(outside / 'checkpoint')!r})"
    with pytest.raises(sandbox.Impossible, match=f"{name}: forbidden.*--dr-rl-unsafe-sandbox"):
        passes(code, "")
    assert (outside / "checkpoint").exists()
    monkeypatch.setenv(sandbox.UNSAFE, "1")
    assert passes(code, "", PATIENT) and not (outside / "checkpoint").exists()
    assert passes("import os; open('a', 'w'); assert 'HOME' not in os.environ", "", PATIENT)


def test_a_launcher_that_cant_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_BOOT", "raise SystemExit(3)")
    with pytest.raises(sandbox.Impossible, match="its launcher ended with code 3"):
        passes("", "")


@pytest.fixture(params=["as the kernel has it", "no namespaces"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no namespaces":
        forbidding(monkeypatch, "os.unshare")
        monkeypatch.setenv(sandbox.UNSAFE, "1")


def leaving(name: str) -> str:
    """Code that leaves processes of this name, in its session and, by a grandchild, out of it."""
    return f"""
import ctypes, os, time
ctypes.CDLL(None).prctl(15, {name.encode()!r}, 0, 0, 0)
if os.fork() == 0:
    time.sleep(60)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
"""


def running(name: str) -> int:
    """Processes of this name, zombies left out."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            about, _, rest = path.read_text().rpartition(")")
            found += about.endswith(f"({name}") and rest.split()[0] != "Z"
    return found


def until(true: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return true()


@pytest.mark.parametrize("ends", [True, False], ids=["ends", "is late"])
def test_nothing_outlives_a_run(kernel: None, ends: bool, outside: Path) -> None:
    """The program ends when it sees that all its processes were seen."""
    limits, name, seen = PATIENT if ends else Limits(5.0), f"left{os.getpid()}", "seen"
    wait = f"while not os.path.exists({str(outside / seen)!r}): time.sleep(0.02)"
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(passes, f"{leaving(name)}\n{wait}", "", limits)
        assert until(lambda: running(name) >= 3)
        if ends:
            (outside / seen).touch()
    assert run.result() == ends
    assert running(name) == 0


def test_nothing_outlives_who_waits_for_it(kernel: None) -> None:
    """As when a reward worker that is late is killed."""
    name = f"late{os.getpid()}"
    run = (
        "from megatron_dr.rl import sandbox\n"
        f"sandbox._BOOT = {sandbox._BOOT!r}\n"
        f"sandbox.passes({leaving(name) + 'time.sleep(60)'!r}, '')"
    )
    waiting = subprocess.Popen([sys.executable, "-c", run])
    assert until(lambda: running(name) >= 3)
    waiting.kill()
    waiting.wait()
    assert until(lambda: running(name) == 0, 10.0)
