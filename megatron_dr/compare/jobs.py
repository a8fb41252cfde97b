"""A training run of an experiment, and whether it is finished already."""

import dataclasses
import functools
import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dr.report import metrics
from megatron_dr.version import VERSION


@dataclass(frozen=True)
class Job:
    """A run of `megatron_dr.train`, with all that it writes in a folder of its own.

    Attributes:
        name: on the screen.
        arm, seed: what it is a run of.
        steps: of its training.
        flags: of `megatron_dr.train`.
        after: the folder of a run that must be done before.
        origin: what it begins from, where a folder among the flags does not tell by its path.
    """

    name: str
    arm: str
    seed: int
    steps: int
    folder: Path
    flags: tuple[str, ...]
    after: Path | None = None
    origin: str = ""

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the flags, of the content of the files that they name, and of what it begins from."""
        paths = {flag: Path(flag) for flag in self.flags if not flag.startswith("-")}
        given = {flag: digest(path) for flag, path in paths.items()
                 if path.is_file() and self.folder not in path.parents}  # fmt: skip
        text = json.dumps([VERSION, self.flags, given, self.origin])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def done(self) -> dict[str, Any]:
        """What its last complete run left: fingerprint, seconds, memory [bytes]; else empty."""
        return read_table(self.folder / "done")

    @property
    def is_finished(self) -> bool:
        """Whether this very run is complete."""
        return bool(self.done.get("fingerprint") == self.fingerprint)

    @property
    def failure(self) -> str | None:
        """Why it failed when it last ran, and where its log is; None where it did not."""
        path = self.folder / "failed"
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Its metrics of a kind so far."""
        path = self.folder / "metrics.jsonl"
        return metrics.read(path, kind) if path.exists() else []


def read_table(path: Path) -> dict[str, Any]:
    """What a file of ours holds; empty where there is none, or a machine that went down cut it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def job(arm: str, seed: int, steps: int, folder: Path, flags: str, **more: Any) -> Job:
    """A run of an arm; its metrics go to its folder. `flags`: as a shell has them; `seed` 0: it is
    the only one."""
    name = f"{arm}, seed {seed}" if seed else arm
    given = (*shlex.split(flags), "--dr-metrics", f"{folder}/metrics.jsonl")
    return Job(name, arm, seed, steps, folder, given, **more)


def write(jobs: Sequence[Job], path: Path) -> None:
    """As the runner reads them."""
    plan = [{**dataclasses.asdict(job), "fingerprint": job.fingerprint} for job in jobs]
    path.write_text(json.dumps(plan, indent=1, default=str), encoding="utf-8")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = path.stat()
    return _digest(path, found.st_size, found.st_mtime_ns)


@functools.cache  # all runs read the same files
def _digest(path: Path, _size: int, _changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
