"""Tables and plots of arms that ran with several seeds."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from rich.console import Console
from rich.table import Table


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def table(
    title: str, header: list[str], rows: list[list[str]], path: Path, console: Console,
    caption: str | None = None,
) -> None:  # fmt: skip
    """On the screen and as Markdown; the default's row is bold."""
    on_screen = Table(*header, title=title, caption=caption)
    for row in rows:
        on_screen.add_row(*row, style="bold" if "default" in row[0] else None)
    console.print(on_screen)
    lines = [header, ["---"] * len(header), *rows]
    text = [f"{title}\n", *("| " + " | ".join(line) + " |" for line in lines)]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")


def band(axis: Any, curves: list[dict[int, float]], label: str, **style: Any) -> None:
    """The mean over seeds of step -> value, and one standard deviation around it."""
    steps = list(curves[0])
    values = [[curve[step] for curve in curves] for step in steps]
    means = [statistics.mean(v) for v in values]
    line = axis.plot(steps, means, label=label, **style)[0]
    if len(curves) > 1:
        sd = [statistics.stdev(v) for v in values]
        low, high = ([m + k * d for m, d in zip(means, sd, strict=True)] for k in (-1, 1))
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
