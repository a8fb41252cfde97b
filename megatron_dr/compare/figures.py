"""Numbers of arms that ran with several seeds, and their tables."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_dr.compare.jobs import Job


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


@dataclass(frozen=True)
class Difference:
    """Mean over seeds, and its standard error; None with one seed."""

    mean: float
    se: float | None

    def as_json(self) -> dict[str, float | None]:
        return {"mean": self.mean, "se": self.se}


def standard_error(values: Sequence[float]) -> float | None:
    """Of their mean: sd / sqrt(n); None with one."""
    if len(values) == 1:
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def paired(values: Sequence[float], others: Sequence[float]) -> Difference:
    """Of `values` from `others`, seed by seed."""
    gaps = [a - b for a, b in zip(values, others, strict=True)]
    return Difference(statistics.mean(gaps), standard_error(gaps))


def in_errors(difference: Difference) -> float:
    """How many standard errors it is; infinite where all seeds differ by the same."""
    if not difference.se:
        return math.copysign(math.inf, difference.mean) if difference.mean else 0.0
    return difference.mean / difference.se


def summary(values: Sequence[float]) -> dict[str, Any]:
    """As results.json has it."""
    return {"values": list(values), "mean": statistics.mean(values), "se": standard_error(values)}


def with_error(found: Mapping[str, Any], form: str = ".3f") -> str:
    """Mean and standard error."""
    error = "" if found["se"] is None else f" ± {found['se']:.3f}"
    return format(found["mean"], form) + error


def step_times(jobs: Sequence[Job]) -> dict[str, float]:
    """arm -> median seconds of a training step."""
    seconds: dict[str, list[float]] = {}
    for job in jobs:
        lines = job.lines("train")
        seconds.setdefault(job.arm, []).extend(line["step seconds"] for line in lines)
    return {arm: statistics.median(values) for arm, values in seconds.items()}


def table(
    title: str, header: list[str], rows: list[list[str]], path: Path, console: Console,
    caption: str | None = None, bold: str = "default",
) -> None:  # fmt: skip
    """On the screen and as Markdown; rows whose name has `bold` in it are so on the screen."""
    on_screen = Table(*header, title=title, caption=caption)
    for row in rows:
        on_screen.add_row(*row, style="bold" if bold in row[0] else None)
    console.print(on_screen)
    lines = [header, ["---"] * len(header), *rows]
    text = [f"{title}\n", *("| " + " | ".join(line) + " |" for line in lines)]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
