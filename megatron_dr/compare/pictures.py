"""Pictures of arms that ran with several seeds."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

Points = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def band(axis: Any, curves: Sequence[Mapping[int, float]], label: str, **style: Any) -> None:
    """The mean over seeds of step -> value, and one standard deviation around it."""
    steps = list(curves[0])
    values = [[curve[step] for curve in curves] for step in steps]
    means = [statistics.mean(v) for v in values]
    line = axis.plot(steps, means, label=label, **style)[0]
    if len(curves) > 1:
        sd = [statistics.stdev(v) for v in values]
        low, high = ([m + k * d for m, d in zip(means, sd, strict=True)] for k in (-1, 1))
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)


def curves(
    found: Mapping[str, Sequence[Mapping[str, Mapping[int, float]]]], before: Mapping[str, float],
    unit: str, seeds: int, path: Path,
) -> None:  # fmt: skip
    """Validation losses of both roles against steps.

    Args:
        found: arm -> of each seed: set -> step -> loss.
        before: set -> loss at step 0.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, name in zip(axes, ("target", "general"), strict=True):
        reached = [before[name]]
        for arm, runs in found.items():
            points = [{0: before[name], **run[name]} for run in runs]
            band(axis, points, arm, marker=".")
            reached += [loss for run in points for loss in run.values()]
        axis.axhline(before[name], color="gray", ls=":", label="before")
        low = min(reached)
        room = max(before[name] - low, 0.1)
        axis.set(title=f"{name}, validation (mean ± sd of {seeds} seed(s))", xlabel="step",
                 ylabel=f"loss ({unit})")  # fmt: skip
        axis.set_ylim(low - 0.1 * room, min(max(reached), before[name] + room) + 0.1 * room)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def pareto(
    points: Points, path: Path, edge: float, labels: tuple[str, str], title: str,
    star: str, colours: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Each arm's mean and standard deviation of two losses; lower left is better.

    Args:
        points: arm -> its seeds' (x, y).
        edge: an arm whose y is not below it is named in the legend alone.
        labels: of the axes, with units.
        star: the arm that has one.
        colours: of arms; None: matplotlib's.
    """
    figure, axis = plt.subplots(figsize=(6.5, 5), layout="constrained")
    for arm, (x, y) in points.items():
        at = statistics.mean(x), statistics.mean(y)
        if at[1] >= edge:
            axis.plot([], [], ls="none", label=f"{arm}: off the chart at {at[0]:.2f}, {at[1]:.2f}")
            continue
        axis.errorbar(
            *at, label=arm, capsize=3, markersize=9, ls="none",
            marker="*" if arm == star else "o", color=(colours or {}).get(arm),
            xerr=statistics.stdev(x) if len(x) > 1 else None,
            yerr=statistics.stdev(y) if len(y) > 1 else None,
        )  # fmt: skip
    axis.set(xlabel=labels[0], ylabel=labels[1], title=title)
    axis.margins(0.12)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)
