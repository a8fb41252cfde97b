"""Metrics as JSON lines: {"kind": "train" | "validation", "iteration": n, <name>: number, ...}."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends a line per call, each flushed, so that it can be followed while a run goes on.

    Raises:
        ValueError: the folder can't be made or the file can't be written.
    """

    def __init__(self, path: str) -> None:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+", encoding="utf-8", buffering=1)
            self._end_line()
        except OSError as error:
            raise ValueError(f"{path}: can't be written ({error.strerror}).") from None

    def _end_line(self) -> None:
        """End a line that a crash cut short."""
        self._file.seek(0)
        text = self._file.read()
        if text and not text.endswith("\n"):
            self._file.write("\n")

    def write(self, kind: str, iteration: int, values: Mapping[str, Any]) -> None:
        """Values are numbers or one-element tensors; None is left out."""
        numbers = {name: float(v) for name, v in values.items() if v is not None}
        line = {"kind": kind, "iteration": iteration, **numbers}
        self._file.write(json.dumps(line) + "\n")


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
