"""The sandbox that runs models' code: what works in it, and how it ends; for the rest `escapes`."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_dr.rl import sandbox
from megatron_dr.rl.sandbox import Limits, passes, screen

from .escapes._observed import needs_namespaces

PATIENT = Limits(wall_seconds=60.0, cpu_seconds=30)  # for what passes on a busy machine


@pytest.mark.parametrize("code", ["def", "\x00\ud800", "raise ValueError"])
def test_code_that_does_not_reach_the_end_fails(code: str) -> None:
    assert not passes(code, "", PATIENT)


def test_code_may_print() -> None:
    code = "print('a'); import atexit; atexit.register(print, 'b')"
    assert passes(code, "print('c')", PATIENT)


def test_code_runs_in_its_own_folder_with_an_empty_environment() -> None:
    code = "import os; here = os.getcwd(); open('a', 'w').write('b')"
    assert passes(code, f"assert here != {str(Path.cwd())!r} and 'HOME' not in os.environ")


@pytest.fixture
def outside() -> Iterator[Path]:
    """A folder of the user's, in no place that the sandbox hides."""
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
        Path(folder, "checkpoint").write_text("weights")
        Path(folder, "target.jsonl").write_text("data\n")
        yield Path(folder)


@needs_namespaces
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


@needs_namespaces
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
from megatron_dr.rl.sandbox import apart, calls, landlock, screen
def forbidden(*_):
    raise PermissionError("{name}: forbidden")
{name} = forbidden
""" for name in names)  # fmt: skip


def forbidding(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    first, rest = sandbox._BOOT.split("\n", 1)
    monkeypatch.setattr(sandbox, "_BOOT", f"{first}\n{without(*names)}\n{rest}")


def test_a_machine_that_cant_keep_code_apart_does_not_run_it(
    monkeypatch: pytest.MonkeyPatch, outside: Path
) -> None:
    forbidding(monkeypatch, "os.unshare")
    code = f"import os; os.unlink({str(outside / 'checkpoint')!r})"
    with pytest.raises(sandbox.Impossible, match="os.unshare: forbidden.*--dr-rl-unsafe-sandbox"):
        passes(code, "")
    assert (outside / "checkpoint").exists()
    monkeypatch.setenv(sandbox.UNSAFE, "1")
    assert passes(code, "", PATIENT) and not (outside / "checkpoint").exists()
    code = "import os; open('a', 'w'); assert 'HOME' not in os.environ"
    assert passes(code, "assert os.stat('.').st_mode & 0o777 == 0o700", PATIENT)


@needs_namespaces
@pytest.mark.parametrize("name", ["calls.mount", "calls.make_read_only", "apart.show_processes",
                                  "landlock.write_only_in", "screen.forbid_some"])  # fmt: skip
def test_each_part_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forbidding(monkeypatch, name)
    with pytest.raises(sandbox.Impossible, match=f"{name}: forbidden"):
        sandbox.check()


def test_a_kernel_that_refuses_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The filter of the sandbox, set before it begins, makes this kernel one."""
    first, rest = sandbox._BOOT.split("\n", 1)
    filtered = "from megatron_dr.rl.sandbox import calls, screen\ncalls.prctl(38, 1)\n"
    monkeypatch.setattr(sandbox, "_BOOT", f"{first}\n{filtered}screen.forbid_some()\n{rest}")
    with pytest.raises(sandbox.Impossible, match="Operation not permitted"):
        sandbox.check()


def test_the_filter_has_a_table_for_two_machines() -> None:
    for machine in ("x86_64", "aarch64"):
        code = screen._filter(machine)
        assert len(code) % 8 == 0 and len(code) < 8 * 256
    with pytest.raises(OSError, match="no table of system calls for riscv64"):
        screen._filter("riscv64")


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


def test_tests_that_no_file_holds_are_refused() -> None:
    """Cut they would fail good code, or pass bad code."""
    small = Limits(60.0, 30, file_mib=2)
    with pytest.raises(ValueError, match="tests of 1048591 bytes are more than the 1048576"):
        passes("a = 1", "#" + "x" * 2**20 + "\nassert a == 1", small)
    assert passes("a = 1", "#" + "x" * 2**19 + "\nassert a == 1", small)
    assert not passes("a = 1\n#" + "x" * 2**20, "assert a == 1", small)
