"""The report of `megatron-dr gpu-check`: JSON after each line that is found, and a table."""

import json
import os
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_dr.version import VERSION

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "numpy")


class Report:
    """What was found so far, also on disk.

    Attributes:
        bad: whether something failed.
    """

    def __init__(self, folder: Path, device: Any) -> None:
        self.folder, self.bad = folder, False
        self._content: dict[str, Any] = {"machine": machine(device), "parts": {}}
        self._write()

    def begin(self, part: str) -> None:
        """A part runs: so it stands there where the process is killed in it."""
        self._content["parts"][part] = {"state": "running", "seconds": 0.0, "found": []}
        self._write()

    def add(self, part: str, found: Any) -> None:
        """A line, in place of one of the same name."""
        lines = self._content["parts"][part]["found"]
        new = asdict(found)
        places = [n for n, line in enumerate(lines) if line["name"] == found.name]
        if places:
            lines[places[0]] = new
        else:
            lines.append(new)
        self._write()

    def fail(self, part: str, said: str, text: str) -> None:
        """The part itself ended with an error."""
        self._content["parts"][part].update(state="FAILED", error=said, traceback=text)
        self.bad = True
        self._write()

    def end(self, part: str, seconds: float) -> None:
        """The part is over: FAILED where a line of it is, skipped where all are."""
        own = self._content["parts"][part]
        own["seconds"] = round(seconds, 1)
        states = [line["state"] for line in own["found"]]
        if own["state"] == "running":
            skipped = states and all(state.startswith("skipped") for state in states)
            own["state"] = "FAILED" if "FAILED" in states else states[0] if skipped else "ok"
        self.bad = self.bad or own["state"] == "FAILED"
        self._write()

    def close(self, said: str) -> None:
        """The check ends before its time."""
        self._content["ended"] = said
        self.bad = True
        self._write()

    def _write(self) -> None:
        path = self.folder / "report.json"
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(self._content, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, path)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(part, check, state, what was found)."""
        out = []
        for name, part in self._content["parts"].items():
            out.append((name, "", part["state"], part.get("error", f"{part['seconds']} s")))
            for line in part["found"]:
                figures = [f"{key} {number(value)}" for key, value in line["figures"].items()]
                said = "; ".join(filter(None, [", ".join(figures), line["said"]]))
                out.append(("", line["name"], line["state"], said))
        if "ended" in self._content:
            out.append(("", "", "FAILED", self._content["ended"]))
        return out

    def show(self) -> None:
        """Print the table, by rich where it is there, and write it as plain text."""
        heads, rows = ("part", "check", "state", "found"), self.rows()
        words = ", ".join(f"{k} {v}" for k, v in self._content["machine"].items())
        plain = [words, *("  ".join([f"{p:9}", f"{c:52}", f"{s:8}", f]) for p, c, s, f in rows)]
        (self.folder / "report.txt").write_text("\n".join(plain) + "\n", encoding="utf-8")
        try:
            from rich.console import Console
            from rich.markup import escape
            from rich.table import Table
        except ImportError:
            print("\n".join(plain))
            return
        table = Table(*heads, box=None, padding=(0, 2, 0, 0))
        for part, check, state, found in rows:
            colour = {"ok": "green", "FAILED": "bold red", "measured": "cyan"}.get(state, "dim")
            shown = f"[{colour}]{escape(state)}[/]"
            table.add_row(part, escape(check), shown, escape(found))
        console = Console()
        console.print(words, soft_wrap=True, highlight=False)
        console.print(table)


def number(value: float | str) -> str:
    """Figures in few digits; counts whole."""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def machine(device: Any) -> dict[str, str]:
    """Whose figures they are, and when."""
    import torch

    out = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "megatron_dr": VERSION,
        "Python": platform.python_version(), "device": platform.processor() or "CPU",
    }  # fmt: skip
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        out["device"] = f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
        out["CUDA"] = str(torch.version.cuda)
    for package in _PACKAGES:
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "absent"
    return out
