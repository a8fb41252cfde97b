"""One worker of a `RewardPool`: starts, asks, and kills it when it is late."""

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_START_SECONDS = 120.0  # imports may be slow on a shared file system
_LONGEST_WAIT = 3600.0  # poll() takes no more than 24 days at a time
_NOISE = 1 << 24  # bytes that are no reply, of one sample


@dataclass(frozen=True)
class RewardFailure:
    """Why a sample has no reward: its kind, for counting, and a sentence."""

    kind: str
    message: str


class RewardProcess:
    """A process that evaluates one sample at a time; it starts at the first and after a failure.

    Args:
        name: `module:function`.
        environment: variables that it has beside this process's.
    """

    def __init__(self, name: str, environment: dict[str, str]) -> None:
        self._name, self._environment = name, environment
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
            env={
                **os.environ, **self._environment,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
            start_new_session=True,  # the function's own children are killed with it
        )  # fmt: skip
        reply = self._ask([], _START_SECONDS)
        if not isinstance(reply, RewardFailure) and "ready" in reply:
            return
        self.stop()
        if isinstance(reply, RewardFailure):
            raise ValueError(f"reward {self._name!r} can't be loaded: its import {reply.message}.")
        raise ValueError(reply["message"])

    def evaluate(self, sample: tuple[str, str, Any], timeout: float) -> float | RewardFailure:
        """The reward, or why there is none; a process that is late or gone is ended.

        Raises:
            ValueError: the process can't be started, or the function can't be used here.
            TypeError: the sample is not JSON.
        """
        json.dumps(sample)  # tells what is wrong before anything runs
        if self._process is None or self._process.poll() is not None:
            self.start()
        reply = self._ask(sample, timeout)
        if isinstance(reply, RewardFailure):
            self.stop()
            return reply
        if reply.get("error") == "load":
            raise ValueError(reply["message"])
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

    def _ask(self, sample: Sequence[Any], timeout: float) -> dict[str, Any] | RewardFailure:
        """The reply to a sample, or why none came. It has a word that only the question has."""
        assert self._process is not None
        word = secrets.token_hex(16)
        line = json.dumps([word, *sample]).encode() + b"\n"
        return self._write(self._process, line) or self._read(self._process, word, timeout)

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
        self, process: subprocess.Popen[bytes], word: str, timeout: float
    ) -> dict[str, Any] | RewardFailure:
        """The line with the word, or why none came; all others are none of ours."""
        assert process.stdout is not None
        deadline, noise = time.monotonic() + timeout, 0
        poll = select.poll()  # select() refuses descriptors from 1024 on
        poll.register(process.stdout, select.POLLIN)
        while True:
            *lines, self._unread = self._unread.split(b"\n")
            for line in lines:
                if word.encode() in line and (reply := _reply(line, word)) is not None:
                    return reply
            noise += sum(map(len, lines))
            left = deadline - time.monotonic()
            if left <= 0:
                return RewardFailure("timeout", f"took longer than {timeout:g} s")
            if noise + len(self._unread) > _NOISE:
                return RewardFailure("crashed", "wrote to the pipe of its replies without end")
            if poll.poll(min(left, _LONGEST_WAIT) * 1000):
                read = os.read(process.stdout.fileno(), 1 << 16)
                if not read:
                    return _crashed(process)
                self._unread += read


def _reply(line: bytes, word: str) -> dict[str, Any] | None:
    """The reply on a line; None where it is something else."""
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return reply if isinstance(reply, dict) and reply.get("word") == word else None


def _crashed(process: subprocess.Popen[bytes]) -> RewardFailure:
    try:
        code = process.wait(5)
    except subprocess.TimeoutExpired:
        return RewardFailure("crashed", "closed its pipe")
    ending = f"was ended by signal {-code}" if code < 0 else f"ended the process with code {code}"
    return RewardFailure("crashed", ending)
