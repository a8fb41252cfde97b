"""Programs that reach their end if they get more than the limits, and must not."""

import time
from pathlib import Path

import pytest

from megatron_dr.rl import sandbox
from megatron_dr.rl.sandbox import Limits

from ._observed import needs_namespaces

pytestmark = needs_namespaces
SMALL = Limits(60.0, 30, memory_mib=150, file_mib=8, processes=12)
SOON = Limits(wall_seconds=1.0, cpu_seconds=30)
BUSY = Limits(wall_seconds=60.0, cpu_seconds=1)

CHILDREN = """
import mmap, os, threading, time
def children(number, work):
    # at work at the same time; the end is reached if nobody ends them
    for _ in range(number):
        if os.fork() == 0:
            kept = work()
            time.sleep(60)
"""
BOMBS = {
    "processes": (SMALL, "children(20, int); time.sleep(5)"),
    "threads": (SMALL, """
threading.stack_size(1 << 16)
for _ in range(20):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
time.sleep(5)
"""),
    "processes that end at once": (Limits(1.0, 30, processes=12), """
while time.sleep(0) is None:
    if os.fork() == 0:
        os.fork()
        os._exit(0)
"""),
    "memory of one": (SMALL, "x = bytearray(1 << 28)"),
    "memory of all": (SMALL, "children(4, lambda: bytearray(b'1') * (60 << 20)); time.sleep(5)"),
    "memory that is shared": (SMALL, """
def shared():
    x = mmap.mmap(-1, 60 << 20)
    x[:] = bytes(60 << 20)
    return x
children(4, shared)
time.sleep(5)
"""),
    "disk": (SMALL, "for n in range(9): open(f'/tmp/{n}', 'wb').write(bytes(1 << 20))"),
    "one file": (SMALL, "open('/tmp/big', 'wb').write(bytes(9 << 20))"),
    "room without data": (SMALL, "os.posix_fallocate(os.open('a', 66), 0, 9 << 20)"),
    "sparse files, mapped": (SMALL, """
for n in range(4):
    file = open(str(n), "wb+")
    file.truncate(4 << 20)
    x = mmap.mmap(file.fileno(), 4 << 20)
    for at in range(0, 4 << 20, 4096):
        x[at] = 1
"""),
    "/dev/shm": (SMALL, "for n in range(9): open(f'/dev/shm/{n}', 'wb').write(bytes(1 << 20))"),
    "names": (SMALL, "for n in range(5000): os.close(os.open(str(n), 66))"),
    "descriptors": (SMALL, "for _ in range(200): os.dup(0)"),
    "descriptors of all": (SMALL, """
children(11, lambda: [os.dup(0) for _ in range(110)])
time.sleep(5)
"""),
    "CPU": (BUSY, "while time.process_time() < 3: pass"),
    "CPU of all": (BUSY, """
def spin():
    while time.process_time() < 0.7: pass
    os._exit(0)
children(4, spin)
for _ in range(4): os.wait()
"""),
    "time": (SOON, "time.sleep(30)"),
    "stopped": (SOON, "os.kill(os.getpid(), 19)"),
    "deaf": (SOON, "import signal; signal.signal(15, signal.SIG_IGN); signal.pause()"),
    "output": (SOON, "while True: os.write(1, b'x' * 65536); os.write(2, b'x' * 65536)"),
    "dump": (SMALL, "os.abort()"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_limits_hold(name: str) -> None:
    """What a run does not get by one process it does not get by several."""
    limits, code = BOMBS[name]
    began = time.monotonic()
    assert not sandbox._reaches_end(CHILDREN + code, "", limits)
    assert time.monotonic() - began < 40


@pytest.mark.parametrize("signal", [9, 19], ids=["kill", "stop"])
def test_its_process_group_is_its_own(signal: int) -> None:
    """The launcher, which is outside, goes on: it tells the result, or ends what is late."""
    began = time.monotonic()
    about = {"code": f"import os; os.kill(0, {signal})", "tests": "", "token": "0", "unsafe": False}
    answer = sandbox._run(about | {"limits": SOON}, Limits(wall_seconds=60.0), "/")
    assert answer == ({"passed": False} if signal == 9 else {})
    assert time.monotonic() - began < 40


def test_much_output_is_no_error_and_nothing_is_kept() -> None:
    """Of two runs the second finds nothing of the first, nor does the user."""
    places = [f"{folder}/kept" for folder in ("/tmp", "/var/tmp", "/dev/shm")]
    code = f"""
import os
for place in {places}:
    assert not os.path.exists(place)
for place in {places}:
    open(place, "w").write("x")
for _ in range(100):
    print("x" * (1 << 18))
"""
    for _ in range(2):
        assert sandbox._reaches_end(code, "", Limits(60.0, 30))
    assert not any(map(Path.exists, map(Path, places)))
