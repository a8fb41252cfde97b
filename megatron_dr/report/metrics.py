"""Metrics as JSON lines: {"kind": "train" | "validation" | ..., "iteration": n, <name>: number}.

Three kinds are not of numbers by name: `run`, what the run is, at its start and after each resume
({"run": {...}}, see `about`); `blocks`, where a name has a list, a number for each of the blocks
that the line `run` names; `end`, after a run that has ended as it should.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
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
        """Values are numbers, one-element tensors or lists of numbers; None is left out."""
        numbers = {
            name: [float(one) for one in value] if isinstance(value, list) else float(value)
            for name, value in values.items()
            if value is not None
        }
        self._put({"kind": kind, "iteration": iteration, **numbers})

    def begin(self, iteration: int, run: Mapping[str, Any]) -> None:
        """What the run is that begins, or goes on, after this iteration."""
        self._put({"kind": "run", "iteration": iteration, "run": run})

    def _put(self, line: Mapping[str, Any]) -> None:
        self._append(json.dumps(line, default=str).encode() + b"\n")

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
        note(
            f"{self._path}: can't be written ({error.strerror}); the run goes on, and its metrics "
            "of these steps are lost"
        )


def note(text: str) -> None:
    """A line for who watches the run; it never ends one."""
    with contextlib.suppress(OSError):  # where stderr is a file on a full disk
        print(f"megatron_dr: note: {text}", file=sys.stderr, flush=True)


def read(path: str | Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind, in order; a line cut short by a crash is left out."""
    return [line for line in lines(path) if line["kind"] == kind]


def lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """All lines in order, without what is none: cut short, or still being written."""
    return filter(None, map(parsed, Path(path).read_bytes().split(b"\n")))


def _whole(digits: str) -> float:
    """Of more digits than any count has, infinity or near it."""
    return int(digits) if len(digits) < 19 else float(digits)


def parsed(text: bytes) -> dict[str, Any] | None:
    """A line; None for what is none."""
    try:
        line = json.loads(text, parse_int=_whole)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and isinstance(line.get("kind"), str) else None
