"""The shipped rewards, and the sandbox that runs models' code."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_dr.rl import rewards
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
    assert rewards.load_reward(f"megatron_dr.rl.rewards:{name}")("", completion, answer) == reward


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


@pytest.mark.parametrize("leave", ["", "os.setsid()"])
def test_nothing_outlives_a_run(tmp_path: Path, leave: str) -> None:
    beat = tmp_path / "beat"
    code = (
        "import os, time\n"
        f"if os.fork() == 0:\n    {leave or 'pass'}\n"
        f"    for _ in range(600):\n        open({str(beat)!r}, 'a').write('x'); time.sleep(0.05)\n"
        "time.sleep(60)"
    )
    assert not passes(code, "", QUICK)
    size = beat.stat().st_size
    assert size > 0
    time.sleep(0.5)
    assert beat.stat().st_size == size
