"""Metrics as JSON lines: {"kind": "train" | "validation", "iteration": n, <name>: number, ...}."""

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends a line per call, each written at once, so that a run can be followed.

    A line that can't be written is left out whole and said once; the run goes on, and lines follow
    when there is room again.

    Raises:
        ValueError: the folder can't be made or the file can't be opened.
    """

    def __init__(self, path: str) -> None:
        self._path, self._said = path, False
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab+", buffering=0)
        except OSError as error:
            raise ValueError(f"{path}: can't be written ({error.strerror}).") from None
        self._end_line()

    def _end_line(self) -> None:
        """End a line that a crash cut short."""
        with contextlib.suppress(OSError):  # nothing to read: a pipe
            self._file.seek(max(self._size() - 1, 0))
            if self._file.read(1) not in (b"", b"\n"):
                self._append(b"\n")

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def write(self, kind: str, iteration: int, values: Mapping[str, Any]) -> None:
        """Values are numbers or one-element tensors; None is left out."""
        numbers = {name: float(v) for name, v in values.items() if v is not None}
        line = {"kind": kind, "iteration": iteration, **numbers}
        self._append(json.dumps(line).encode() + b"\n")

    def note(self, kind: str, iteration: int, values: Mapping[str, Any]) -> None:
        """What is no number, in JSON's types."""
        line = {"kind": kind, "iteration": iteration, **values}
        self._append(json.dumps(line).encode() + b"\n")

    def _append(self, text: bytes) -> None:
        written = 0
        try:
            while written < len(text):  # of a full disk's last bytes a part may be written
                written += self._file.write(text[written:])
        except OSError as error:
            if written:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._size() - written)
            self._say(error)

    def _say(self, error: OSError) -> None:
        if self._said:
            return
        self._said = True
        with contextlib.suppress(OSError):  # where stderr is a file on the same disk
            print(
                f"megatron_dr: note: {self._path}: can't be written ({error.strerror}); the run "
                "goes on, and its metrics of these steps are lost",
                file=sys.stderr, flush=True,
            )  # fmt: skip


def read(path: str | Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind, in order; a line cut short by a crash is left out."""
    lines = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if line["kind"] == kind:
            lines.append(line)
    return lines
