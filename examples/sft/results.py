"""The SFT example's table and plots, from the runs' metrics."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from rich.console import Console

from megatron_dr.compare import figures, pictures
from megatron_dr.compare.jobs import Job

UNIT = "loss (nats per byte)"
LOSSES = {"target loss": "held-out target (Spanish)", "lm loss": "held-out general"}
COLOURS = {
    "base": "tab:gray", "general only": "tab:blue", "target only": "black",
    "mix, 5% target": "tab:cyan", "mix, 10% target": "tab:green", "mix, 20% target": "tab:olive",
    "top-k per layer": "tab:purple", "cone, alpha 0.05": "tab:orange",
    "cone, auto (default)": "tab:red",
}  # fmt: skip


def curves(jobs: list[Job]) -> dict[str, list[list[dict[str, Any]]]]:
    """arm -> one list of validations per seed; the first is the base model's, as step 0."""
    out: dict[str, list[list[dict[str, Any]]]] = {}
    start: dict[str, Any] = {}
    for job in jobs:
        lines = job.lines("validation")
        by_step = {line["iteration"]: line for line in lines}
        if job.arm == "base":
            start = {**lines[-1], "iteration": 0}
            out["base"] = [[start]]
        else:
            out.setdefault(job.arm, []).append([start, *by_step.values()])
    return out


def final(runs: list[list[dict[str, Any]]], key: str) -> list[float]:
    return [run[-1][key] for run in runs]


def write(jobs: list[Job], out: Path, console: Console) -> None:
    """table.md, losses.png and tradeoff.png in the output folder, and the table on the screen."""
    arms = curves(jobs)
    seeds = max(len(runs) for runs in arms.values())
    mixes = [arm for arm in arms if arm.startswith("mix")]
    best_mix = min(mixes, key=lambda arm: statistics.mean(final(arms[arm], "target loss")))
    times = figures.step_times([job for job in jobs if job.arm != "base"])
    notes = {"base": "before fine-tuning", best_mix: "best mix, chosen on these losses"}
    rows = []
    for arm, runs in arms.items():
        ratio = f"{times[arm] / times['general only']:.2f}" if arm in times else ""
        losses = [figures.spread(final(runs, key)) for key in LOSSES]
        rows.append([arm, *losses, ratio, notes.get(arm, "")])
    title = f"Held-out loss after fine-tuning, nats per byte, mean ± sd of {seeds} seed(s)"
    header = ["arm", *LOSSES.values(), "step time", ""]
    caption = "step time: median, relative to general only"
    figures.table(title, header, rows, out / "table.md", console, caption)
    plot_losses(arms, out / "losses.png", seeds)
    plot_tradeoff(arms, out / "tradeoff.png", seeds)
    console.print(f"Plots: {out / 'losses.png'}, {out / 'tradeoff.png'}")


def plot_losses(arms: dict[str, Any], path: Path, seeds: int) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, (key, name) in zip(axes, LOSSES.items(), strict=True):
        for arm, runs in arms.items():
            if arm == "base":
                continue
            points = [{v["iteration"]: v[key] for v in run} for run in runs]
            pictures.band(axis, points, arm, color=COLOURS.get(arm), marker=".")
        axis.set(title=f"{name}, mean ± sd of {seeds} seed(s)", xlabel="step", ylabel=UNIT)
        axis.grid(alpha=0.3)
        start = arms["base"][0][0][key]
        axis.set_ylim(top=start + 0.35 if key == "lm loss" else start + 0.1)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_tradeoff(arms: dict[str, Any], path: Path, seeds: int) -> None:
    """Final losses of both roles; what is no better than the base model is in the legend."""
    points = {
        arm: (final(runs, "lm loss"), final(runs, "target loss")) for arm, runs in arms.items()
    }
    labels = f"held-out general {UNIT}", f"held-out target {UNIT}"
    title = f"Lower left is better (mean ± sd of {seeds} seed(s))"
    edge = arms["base"][0][0]["target loss"]
    pictures.pareto(points, path, edge, labels, title, "cone, auto (default)", COLOURS)
