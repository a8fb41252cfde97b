"""Chat templates rendered in a process of their own, with limits of time, memory and size.

A template is a program that comes with a model. Jinja's sandbox keeps it from Python, not from
counting to 10^20 or from writing a text of 100 GB. The process is started by the first
conversation and lives as long as this one; a conversation is one request, whatever is rendered for
it.
"""

import contextlib
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dr.data.chat_template import read_from
from megatron_dr.data.messages import Message

SECONDS = 30  # of a processor, for all that is rendered of a conversation
MEMORY = 1 << 30  # bytes, beside what the process has before
CHARACTERS = 1 << 26  # of a rendered conversation
_WAIT = 900.0  # seconds on the clock, where the machine is busy
_MOST = CHARACTERS * 4 + (1 << 24)  # bytes of an answer


@dataclass(frozen=True)
class Rendering:
    """What a chat template makes of a conversation.

    Attributes:
        spans: the characters that are the assistant's.
        marked: whether the template itself says so, by {% generation %} marks.
    """

    text: str
    spans: list[tuple[int, int]]
    marked: bool


class Templates:
    """A tokenizer's chat templates, as `tokenizer.get_chat_template` chooses among several."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = {
            name: token if isinstance(token, list) else str(token)
            for name, token in tokenizer.special_tokens_map.items()
        }

    def render(
        self, kind: str, messages: list[Message], tools: Any = None, **more: Any
    ) -> Rendering:
        """One conversation.

        Args:
            kind: `turns` with the assistant's spans, `prompt` with what asks for an answer, both
                checked; `plain` as it is.
            more: `given` of `turns`: so many first messages have no span.

        Raises:
            ValueError: what the template can't or does not render, or renders beyond the limits.
        """
        text = str(self._tokenizer.get_chat_template(tools=tools))
        place = read_from(text) or getattr(self._tokenizer, "name_or_path", None)
        whose = f"the chat template of {place}" if place else "the chat template"
        request = {
            "kind": kind, "template": text, "special": self._special, "whose": whose,
            "messages": messages, "tools": tools, "most": CHARACTERS, **more,
        }  # fmt: skip
        return _renderer.render(request, whose)


class _Ended(Exception):
    """The process is gone, and why."""


class _Renderer:
    """The process; it starts at the first request, and after one that it didn't survive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, request: Mapping[str, Any], whose: str) -> Rendering:
        try:
            body = pickle.dumps((MEMORY, SECONDS, request))
        except RecursionError:
            raise ValueError("the messages or tools are nested too deeply.") from None
        with self._lock:
            try:
                said, text = self._ask(body)
                if "memory" in said:
                    raise _Ended(f"took more than {MEMORY >> 20} MiB of memory")
            except _Ended as error:
                self._stop()
                raise ValueError(
                    f"{whose} {error} on the messages and was stopped: mend it, or give another "
                    "with --chat-template."
                ) from None
            except BaseException:  # such as Ctrl-C, with an answer on its way
                self._stop()
                raise
        if "error" in said:
            raise ValueError(said["error"])
        spans = [(int(start), int(end)) for start, end in said["spans"]]
        return Rendering(text, spans, said["marked"])

    def _ask(self, body: bytes) -> tuple[dict[str, Any], str]:
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        deadline = time.monotonic() + _WAIT
        with contextlib.suppress(BrokenPipeError):  # reading tells why
            process.stdin.write(len(body).to_bytes(8) + body)
            process.stdin.flush()
        size = int.from_bytes(self._read(process, 8, deadline))
        if size > _MOST:
            raise _Ended("gave an answer of no sense")
        head, _, text = self._read(process, size, deadline).partition(b"\n")
        return json.loads(head), text.decode()

    def _start(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_dr.data.render_worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is this process's to answer
        )  # fmt: skip
        return self._process

    def _read(self, process: subprocess.Popen[bytes], size: int, deadline: float) -> bytes:
        assert process.stdout is not None
        pipe, parts = process.stdout.fileno(), []
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while size:
            left = deadline - time.monotonic()
            if left <= 0:
                raise _Ended(f"took more than {_WAIT:.0f} s")
            if poll.poll(left * 1000):
                part = os.read(pipe, min(size, 1 << 20))
                if not part:
                    raise _Ended(_ending(process))
                parts.append(part)
                size -= len(part)
        return b"".join(parts)

    def _stop(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        process.wait()


def _ending(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(10)
    except subprocess.TimeoutExpired:
        return "closed its pipe"
    if code == -signal.SIGXCPU:
        return f"took more than {SECONDS} s of a processor"
    ended = f"signal {-code}" if code < 0 else f"code {code}"
    return f"ended the process that renders it ({ended})"


_renderer = _Renderer()


def _forget() -> None:
    """A fork needs a process of its own: its pipes would be its parent's."""
    global _renderer
    _renderer = _Renderer()


os.register_at_fork(after_in_child=_forget)
