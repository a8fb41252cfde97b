"""The table and the plots of the job with rewards, from the runs' metrics."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from megatron_dr.report import metrics

# kind of the lines, name in them, title
CURVES = (
    ("validation", "target reward", "held-out target reward (all answers right)"),
    ("validation", "reward", "held-out general reward (some answers wrong)"),
    ("train", "kl", "KL to the base model (nats per token)"),
    ("train", "response length", "response length (tokens)"),
)
HEADER = ["arm", "target reward", "general reward", "KL", "response length"]


def values(job: dict[str, Any], kind: str, name: str) -> dict[int, float]:
    """iteration -> value."""
    lines = metrics.read(Path(job["folder"]) / "metrics.jsonl", kind)
    return {line["iteration"]: line[name] for line in lines if name in line}


def spread(numbers: list[float]) -> str:
    if len(numbers) == 1:
        return f"{numbers[0]:.3f}"
    return f"{statistics.mean(numbers):.3f} ± {statistics.stdev(numbers):.3f}"


def write(jobs: list[dict[str, Any]], out: Path, console: Console) -> None:
    """table.md and curves.png in the output folder, and the table on the screen."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for job in jobs[1:]:
        arms.setdefault(job["arm"], []).append(job)
    rows = []
    for arm, runs in arms.items():
        last = [[list(values(job, kind, name).values())[-1] for job in runs]
                for kind, name, _ in CURVES]  # fmt: skip
        rows.append([arm, *map(spread, last)])
    seeds = len(next(iter(arms.values())))
    title = f"After the last step, mean ± sd of {seeds} seed(s)"
    table = Table(*HEADER, title=title)
    for row in rows:
        table.add_row(*row, style="bold" if "default" in row[0] else None)
    console.print(table)
    text = [f"{title}\n", *("| " + " | ".join(r) + " |" for r in (HEADER, ["---"] * 5, *rows))]
    (out / "table.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    plot(arms, out / "curves.png", seeds)
    console.print(f"Plots: {out / 'curves.png'}")


def plot(arms: dict[str, list[dict[str, Any]]], path: Path, seeds: int) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for axis, (kind, name, title) in zip(axes.flat, CURVES):
        for arm, runs in arms.items():
            curves = [values(job, kind, name) for job in runs]
            steps = list(curves[0])
            means = [statistics.mean(c[s] for c in curves) for s in steps]
            line = axis.plot(steps, means, label=arm)[0]
            if seeds > 1:
                sd = [statistics.stdev(c[s] for c in curves) for s in steps]
                low, high = ([m + k * d for m, d in zip(means, sd)] for k in (-1, 1))
                axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.suptitle(f"mean ± sd of {seeds} seed(s)")
    figure.savefig(path, dpi=110)
    plt.close(figure)
