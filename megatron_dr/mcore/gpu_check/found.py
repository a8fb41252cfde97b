"""What a part of the check is given, and what it says."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

OK, FAILED, MEASURED = "ok", "FAILED", "measured"
NO_CUDA = "skipped: no CUDA device"


class Late(BaseException):
    """A part's time is over. Nothing that handles an Exception takes it for its own."""


@dataclass(frozen=True)
class Found:
    """One line of the table. A later one of the same name takes its place.

    Attributes:
        state: ok, FAILED, measured, or `skipped: ` and why.
        figures: by name, with the unit in the name.
        said: a sentence; of what failed, why.
    """

    name: str
    state: str
    figures: dict[str, float | str] = field(default_factory=dict)
    said: str = ""


@dataclass(frozen=True)
class Where:
    """What a part is given.

    Attributes:
        device: a GPU, or the CPU.
        small: whether sizes are cut down.
        out: folder for files.
    """

    device: torch.device
    small: bool
    out: Path

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


def within(name: str, error: float, limit: float, said: str = "") -> Found:
    """ok where the error is at most its limit; NaN is not."""
    state = OK if error <= limit else FAILED
    return Found(name, state, {"error": error, "limit": limit}, said)


def failed(name: str, error: Exception) -> Found:
    """What stopped a check, in one line."""
    words = " ".join(str(error).split())[:500]
    return Found(name, FAILED, {}, f"{type(error).__name__}: {words}")
