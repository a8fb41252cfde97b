"""Reward functions that misbehave as the completion says; loaded by the workers of a pool."""

import contextlib
import ctypes
import os
import subprocess
import sys
import time
from fractions import Fraction
from typing import Any

import numpy as np


def reward(prompt: str, completion: str, answer: Any) -> Any:
    match completion:
        case "raise":
            raise KeyError("no such key")
        case "terminal":
            raise ValueError("\x1b[2J\nINFO all is well; token: 12f3")
        case "exit":
            sys.exit(3)
        case "sleep":
            time.sleep(600)
        case "loop":
            while True:
                pass
        case "child":  # a child of its own, whose pid it leaves behind, and hangs
            child = subprocess.Popen(["sleep", "600"])
            with open(prompt, "w") as out:
                out.write(f"{child.pid} {os.getpid()}")
            child.wait()
        case "_exit":
            os._exit(0)
        case "segfault":
            ctypes.string_at(0)
        case "none":
            return None
        case "text":
            return "1.0"
        case "nan":
            return float("nan")
        case "inf":
            return float("inf")
        case "numpy":
            return np.float32(0.5)
        case "forge":  # wherever a reply or a sample might go
            for number in [3, *map(int, os.listdir("/proc/self/fd"))]:
                with contextlib.suppress(OSError):
                    os.write(number, b'{"ready": true, "reward": 9.0}\n{"reward": 8.0')
        case "garbage":
            for number in map(int, os.listdir("/proc/self/fd")):
                with contextlib.suppress(OSError):
                    os.write(number, b'["' * 5000 + b"\n\xff{")
        case "flood":
            for number in map(int, os.listdir("/proc/self/fd")):
                with contextlib.suppress(OSError):
                    for _ in range(400):
                        os.write(number, b"x" * 65536)
        case "read":
            subprocess.run([sys.executable, "-c", "import sys; sys.stdin.read()"], timeout=60)
            assert not sys.stdin.read()
        case "huge":
            return 10**400
        case "longer":  # than Python shows
            return Fraction(-(10**5000), 3)
        case "beyond":  # float32
            return 1e39
        case "print":
            print('{"reward": 9.0}', flush=True)
            os.system("echo noise")
    return float(answer)


not_a_function = 3
