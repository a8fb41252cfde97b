"""The table and the plots of demos that train by rewards, from the runs' metrics."""

from pathlib import Path

import matplotlib.pyplot as plt
from rich.console import Console

from megatron_dr.compare import figures, pictures
from megatron_dr.compare.jobs import Job

# kind of the lines, name in them, in the table, title of the plot
CURVES = (
    ("validation", "target reward", "target reward", "held-out target reward"),
    ("validation", "reward", "general reward", "held-out general reward"),
    ("train", "kl", "KL", "KL to the base model (nats per token)"),
    ("train", "response length", "length", "response length (tokens)"),
)
LAST = 10  # steps that a training figure in the table is the mean of


def curve(job: Job, kind: str, name: str) -> dict[int, float]:
    """iteration -> value."""
    return {line["iteration"]: line[name] for line in job.lines(kind) if name in line}


def final(job: Job, kind: str, name: str) -> float:
    """Of the last validation, or the mean of the last training steps."""
    values = list(curve(job, kind, name).values())[-1 if kind == "validation" else -LAST :]
    return sum(values) / len(values)


def write(jobs: list[Job], out: Path, console: Console) -> None:
    """table.md and curves.png in the output folder, and the table on the screen."""
    arms: dict[str, list[Job]] = {}
    for job in jobs:
        if curve(job, "train", "kl"):  # not the runs that make the base model
            arms.setdefault(job.arm, []).append(job)
    seeds = len(next(iter(arms.values())))
    of = f"mean ± sd of {seeds} seed(s)"
    rows = []
    for arm, runs in arms.items():
        peaks = [max(curve(job, *CURVES[0][:2]).values()) for job in runs]
        last = [[final(job, kind, name) for job in runs] for kind, name, _, _ in CURVES]
        rows.append([arm, *map(figures.spread, [last[0], peaks, *last[1:]])])
    names = [name for _, _, name, _ in CURVES]
    header = ["arm", names[0], "its best", *names[1:]]
    title = f"After the last step (KL, length: last {LAST} steps), {of}"
    figures.table(title, header, rows, out / "table.md", console)
    plot(arms, out / "curves.png", of)
    console.print(f"Plots: {out / 'curves.png'}")


def plot(arms: dict[str, list[Job]], path: Path, of: str) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for axis, (kind, name, _, title) in zip(axes.flat, CURVES, strict=True):
        for arm, runs in arms.items():
            pictures.band(axis, [curve(job, kind, name) for job in runs], arm)
        axis.set(title=title, xlabel="step", ylabel=title.partition("(")[2].rstrip(")") or "reward")
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.suptitle(of)
    figure.savefig(path, dpi=110)
    plt.close(figure)
