"""The shipped rewards, and the sandbox that runs models' code."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_dr.config.named import load_function
from megatron_dr.rl import rewards, sandbox
from megatron_dr.rl.sandbox import Limits, passes

QUICK = Limits(wall_seconds=1.5, cpu_seconds=1)


@pytest.mark.parametrize(
    "name, completion, answer, reward",
    [
        ("exact_match", " yes\n", "yes", 1.0),
        ("exact_match", "yes.", "yes", 0.0),
        ("exact_match", "12", 12, 1.0),
        ("numeric", "3 + 4 = 7", "7", 1.0),
        ("numeric", "It is 1,234.50 dollars.", 1234.5, 1.0),
        ("numeric", "-2e3", "-2,000", 1.0),
        ("numeric", "7, or rather 8", "7", 0.0),
        ("numeric", "no number", "7", 0.0),
        ("regex", "the cat sat", r"\bcat\b", 1.0),
        ("regex", "concatenate", r"\bcat\b", 0.0),
        ("boxed", r"so \boxed{\frac{1}{2}}.", "0.5", 1.0),
        ("boxed", r"\boxed{1+x}", r"\boxed{x + 1}", 1.0),
        ("boxed", r"\boxed{5}, no: \boxed{\frac{1}{3}}", r"5", 0.0),
        ("boxed", r"it is 5", "5", 0.0),
        ("boxed", r"\boxed{5", "5", 0.0),
        ("unit_tests", "```python\ndef f(x):\n    return x + 1\n```", "assert f(1) == 2", 1.0),
        ("unit_tests", "def f(x): return x", ["assert f(1) == 1", "assert f(2) == 3"], 0.0),
    ],
)
def test_shipped_rewards(name: str, completion: str, answer: Any, reward: float) -> None:
    if name == "boxed":
        pytest.importorskip("math_verify")
    function = load_function("reward", f"megatron_dr.rl.rewards:{name}")
    assert function("", completion, answer) == reward


def test_useless_answers_raise() -> None:
    with pytest.raises(ValueError):
        rewards.numeric("", "7", "seven")
    with pytest.raises(rewards.re.error):
        rewards.regex("", "7", "(")


def test_last_box_may_nest_braces() -> None:
    assert rewards.last_boxed(r"\boxed{1} \boxed{\frac{a}{b^{2}}} }") == r"\frac{a}{b^{2}}"


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


def test_code_runs_in_its_own_folder_with_an_empty_environment() -> None:
    code = "import os; here = os.getcwd(); open('a', 'w').write('b')"
    assert passes(code, f"assert here != {str(Path.cwd())!r} and 'HOME' not in os.environ")


def test_code_has_no_network() -> None:
    unshare = "import os; os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET | os.CLONE_NEWPID)"
    if subprocess.run([sys.executable, "-c", unshare], capture_output=True).returncode:
        pytest.skip("this kernel forbids user namespaces")
    connect = (
        "import socket\ns = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(s.getsockname(), 1)"
    )
    assert not passes(connect, "")


# A launcher on a kernel that forbids user namespaces.
FORBIDDING = f"""
import os, runpy
def unshare(flags):
    raise PermissionError("forbidden")
os.unshare = unshare
runpy.run_path({str(sandbox._LAUNCHER)!r}, run_name="__main__")
"""


@pytest.fixture(params=["as the kernel has it", "no namespaces"])
def launcher(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param != "no namespaces":
        return sandbox._LAUNCHER
    path = tmp_path / "launcher.py"
    path.write_text(FORBIDDING)
    return path


def leaving(folder: Path) -> str:
    """Code that leaves processes that write on, in its session and, by a grandchild, out of it."""
    return f"""
import os, time
def beat(name):
    for _ in range(1200):
        with open({str(folder)!r} + "/" + name, "a") as file:
            file.write("x")
        time.sleep(0.05)
    os._exit(0)
if os.fork() == 0:
    beat("inside")
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        beat("outside")
    os._exit(0)
def begun(name):
    path = {str(folder)!r} + "/" + name
    return os.path.exists(path) and os.path.getsize(path) > 0
while not (begun("inside") and begun("outside")):
    time.sleep(0.01)
"""


def sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in sorted(folder.glob("*side"))]


def assert_nothing_runs(folder: Path) -> None:
    before = sizes(folder)
    assert len(before) == 2 and min(before) > 0
    time.sleep(0.5)
    assert sizes(folder) == before


@pytest.mark.parametrize("end", ["", "time.sleep(60)"], ids=["ends", "is late"])
def test_nothing_outlives_a_run(
    tmp_path: Path, launcher: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "_LAUNCHER", launcher)
    limits = Limits(wall_seconds=3.0)
    assert passes(leaving(tmp_path) + end, "", limits) == (not end)
    assert_nothing_runs(tmp_path)


def test_nothing_outlives_who_waits_for_it(tmp_path: Path, launcher: Path) -> None:
    """As when a reward worker that is late is killed."""
    run = (
        "from pathlib import Path; from megatron_dr.rl import sandbox\n"
        f"sandbox._LAUNCHER = Path({str(launcher)!r})\n"
        f"sandbox.passes({leaving(tmp_path) + 'time.sleep(60)'!r}, '')"
    )
    waiting = subprocess.Popen([sys.executable, "-c", run])
    deadline = time.monotonic() + 30
    while sum(size > 0 for size in sizes(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    waiting.kill()
    waiting.wait()
    time.sleep(0.3)
    assert_nothing_runs(tmp_path)
