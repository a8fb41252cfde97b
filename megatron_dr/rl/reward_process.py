"""One worker of a `RewardPool`: starts, asks, and kills it when it is late."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

_START_SECONDS = 120.0  # imports may be slow on a shared file system


@dataclass(frozen=True)
class RewardFailure:
    """Why a sample has no reward: its kind, for counting, and a sentence."""

    kind: str
    message: str


class RewardProcess:
    """A process that evaluates one sample at a time; it starts at the first and after a failure."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def start(self) -> None:
        """Start the process and wait until it has loaded the function.

        Raises:
            ValueError: it can't be loaded.
        """
        self.stop()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_dr.rl.reward_worker", self._name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # the function's own children are killed with it
        )
        reply = self._read(self._process, _START_SECONDS)
        if not isinstance(reply, RewardFailure) and "ready" in reply:
            return
        self.stop()
        if isinstance(reply, RewardFailure):
            raise ValueError(f"reward {self._name!r} can't be loaded: its import {reply.message}.")
        raise ValueError(reply["message"])

    def evaluate(self, sample: tuple[str, str, Any], timeout: float) -> float | RewardFailure:
        """The reward, or why there is none; a process that is late or gone is ended.

        Raises:
            ValueError: the process can't be started.
            TypeError: the sample is not JSON.
        """
        line = json.dumps(sample).encode() + b"\n"
        if self._process is None or self._process.poll() is not None:
            self.start()
        assert self._process is not None
        reply = self._write(self._process, line) or self._read(self._process, timeout)
        if isinstance(reply, RewardFailure):
            self.stop()
            return reply
        if "error" in reply:
            return RewardFailure(reply["error"], reply["message"])
        return float(reply["reward"])

    def stop(self) -> None:
        """Kill the process and its children, if it runs."""
        if self._process is None:
            return
        process, self._process, self._unread = self._process, None, b""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        process.wait()

    def _write(self, process: subprocess.Popen[bytes], line: bytes) -> RewardFailure | None:
        """Hand a line over; the process reads whenever it is idle, so that this ends."""
        assert process.stdin is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except BrokenPipeError:
            return _crashed(process)
        return None

    def _read(
        self, process: subprocess.Popen[bytes], timeout: float
    ) -> dict[str, Any] | RewardFailure:
        """The next line of the process, or why none came."""
        assert process.stdout is not None
        deadline = time.monotonic() + timeout
        poll = select.poll()  # select() refuses descriptors from 1024 on
        poll.register(process.stdout, select.POLLIN)
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                return RewardFailure("timeout", f"took longer than {timeout:g} s")
            read = os.read(process.stdout.fileno(), 1 << 16)
            if not read:
                return _crashed(process)
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply


def _crashed(process: subprocess.Popen[bytes]) -> RewardFailure:
    try:
        code = process.wait(5)
    except subprocess.TimeoutExpired:
        return RewardFailure("crashed", "closed its pipe")
    ending = f"was ended by signal {-code}" if code < 0 else f"ended the process with code {code}"
    return RewardFailure("crashed", ending)
