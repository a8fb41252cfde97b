"""Code that does not do what the tests ask, and tries to pass them."""

import logging

import pytest

from megatron_dr.rl import sandbox
from megatron_dr.rl.sandbox import Limits, passes

from ._observed import needs_namespaces

pytestmark = needs_namespaces
LIMITS = Limits(wall_seconds=20.0, cpu_seconds=10)
TESTS = "assert double(2) == 4\nassert double(3) == 6"
WRONG = "def double(x): return 0\n"

STEALS = """
import os, stat
def given():
    # what the harness has open: the tests, with the token before them, and where it tells
    found = {}
    for number in range(3, 100):
        try:
            found[stat.S_IFMT(os.fstat(number).st_mode)] = number
        except OSError:
            pass
    return found[stat.S_IFREG], found[stat.S_IFIFO]
def forge():
    tests, tells = given()
    os.write(tells, os.pread(tests, 1 << 16, 0).partition(b"\\n")[0])
    os._exit(0)
"""
FORGED = {
    # by an end before the tests
    "exit": "import sys; sys.exit(0)",
    "_exit": "import os; os._exit(0)",
    "exit in what is imported": "open('m.py', 'w').write('raise SystemExit')\n"
                                "import sys; sys.path.append('.'); import m",
    "exit at the exit": "import atexit, os; atexit.register(os._exit, 0)",
    "another program": "import os; os.execv('/bin/true', ['true'])",
    "a child that ends well": "import os\nif os.fork(): os._exit(0)",
    "exceptions that end well": "import os, sys; sys.excepthook = lambda *_: os._exit(0)",
    "a signal": "import os, signal; signal.signal(14, lambda *_: os._exit(0)); signal.alarm(1)\n"
                "def double(x):\n  while True: pass",
    "a call that exits": "import os\ndef double(x): os._exit(0)",
    # by the text
    "its last line takes a test in": WRONG + "if 0: \\",
    "its last line opens a text": WRONG + "x = '''",
    "its last line opens a block": WRONG + "try:\n  pass\nexcept: \\",
    "an encoding": "# coding: utf-7\n" + WRONG + "if 0: +AFw-",
    "words for the end": WRONG + "print('passed'); print('OK', flush=True)",
    "words on descriptors": WRONG + "import os\nfor n in range(3, 20):\n"
                            "  try: os.write(n, b'passed')\n  except OSError: pass",
    # by what runs the tests
    "another comparison": WRONG + "import builtins\nbuiltins.AssertionError = type('A', (), {})",
    "another compile": WRONG + "import builtins\nbuiltins.compile = lambda *a, **b: ''\n"
                       "builtins.exec = lambda *a: None",
    "another os": WRONG + "import os, sys\nos.pread = lambda *a: b''\nsys.modules['os'] = None",
    "another main module": WRONG + "import sys; sys.modules['__main__'] = sys",
    "lines that are left out": WRONG + """
import sys
def trace(frame, event, argument):
    if event == 'line' and frame.f_code.co_filename == 'tests':
        frame.f_lineno = 2
    return trace
sys.settrace(trace)
sys.setprofile(trace)
""",
    "lines that an audit hook ends": WRONG + """
import os, sys
def hook(event, arguments):
    if event == 'exec' and arguments[0].co_filename == 'tests':
        os._exit(0)
sys.addaudithook(hook)
""",
    # with the token
    "steals the token": STEALS + "forge()",
    "steals it at the exit": STEALS + WRONG + "import atexit; atexit.register(forge)",
    "steals it by an exception": STEALS + WRONG + "import sys; sys.excepthook = lambda *_: forge()",
    "steals it by a thread": STEALS + "import threading, time\n"
                             "threading.Thread(target=forge).start(); time.sleep(20)",
    "steals it in the test": STEALS + "def double(x): forge()",
    "from the frames": STEALS + "import sys\nframe = sys._getframe(1)\n"
                       "assert frame.f_locals['tells'] == given()[1]; forge()",
    "changes the tests": STEALS + WRONG + """
tests = given()[0]
token = os.pread(tests, 1 << 16, 0).partition(b"\\n")[0]
other = os.open(f"/proc/self/fd/{tests}", os.O_RDWR)
os.ftruncate(other, 0)
os.pwrite(other, token + b"\\npass", 0)
""",
    "looks in the first process": "print(open('/proc/1/cmdline').read()); raise SystemExit",
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_forged_results_fail(name: str) -> None:
    assert not passes(FORGED[name], TESTS, LIMITS)


def test_a_token_that_was_stolen_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """It is enough for one run: the second, of tests that fail, finds it out."""
    assert sandbox._reaches_end(FORGED["steals the token"], TESTS, LIMITS)
    with caplog.at_level(logging.WARNING):
        assert not passes(FORGED["steals the token"], TESTS, LIMITS)
    assert "it forges the result" in caplog.text


def test_honest_code_passes() -> None:
    """The tests see its names, and the functions of Python as they were."""
    code = """
from __future__ import annotations
import builtins, inspect, pickle, sys
builtins.len = lambda x: 7
def double(x: Unknown):
    return 2 * x
class Kept: pass
assert __name__ == "__main__" and len(sys.argv) == 7
"""
    tests = f"""
{TESTS}
assert len("ab") == 2 and isinstance(pickle.loads(pickle.dumps(Kept())), Kept)
assert "return 2 * x" in inspect.getsource(double)
"""
    assert passes(code, tests, LIMITS)
    assert passes("raise_ = 1", "# nothing \\", LIMITS)
