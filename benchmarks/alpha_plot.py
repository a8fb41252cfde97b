"""The picture of `alpha.py`: final losses against alpha, and what auto chose."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = {"cone": "tab:red", "mix": "tab:blue"}
NAMES = {"cone": "cone, constant α", "mix": "plain mix (mean of the pool), constant α"}
HEIGHT = 0.45  # of the upper axes, nats per byte


def draw(found: dict[str, Any], titles: dict[str, str], path: Path) -> None:
    """A column per condition. Above: final target loss. Below: alpha that auto chose, by step."""
    figure, axes = plt.subplots(
        2, len(found), figsize=(5 * len(found), 7.5), layout="constrained", squeeze=False
    )
    for (condition, arms), (above, below) in zip(found.items(), axes.T, strict=True):
        _losses(above, arms)
        above.set_title(titles[condition], fontsize=11)
        _chosen(below, arms)
    axes[0, 0].set_ylabel("final held-out target loss (nats per byte)")
    axes[1, 0].set_ylabel("α (share of t)")
    axes[0, len(found) // 2].legend(fontsize=8, loc="upper center")
    count = max(len(arm["seeds"]) for arms in found.values() for arm in arms.values())
    title = f"Share α of the target's own gradient: SFT example, mean ± sd of {count} seed(s)"
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _losses(axis: Any, arms: dict[str, Any]) -> None:
    """alpha is spaced evenly; what lies above the axes is written at their top."""
    constant = {kind: _constant(arms, kind) for kind in COLOURS}
    places = sorted({alpha for points in constant.values() for alpha in points})
    bottom = min(statistics.mean(arm["target loss"]) for arm in arms.values()) - 0.05
    for line, (kind, points) in enumerate(constant.items()):
        x = [places.index(alpha) for alpha in points]
        means = [statistics.mean(losses) for losses in points.values()]
        sds = [_sd(losses) for losses in points.values()]
        axis.errorbar(x, means, sds, fmt="o-", capsize=3, color=COLOURS[kind], label=NAMES[kind])
        for place, mean in zip(x, means, strict=True):
            if mean > bottom + HEIGHT:
                axis.text(place, bottom + HEIGHT - 0.02 * (line + 1), f"↑ {mean:.2f}",
                          ha="center", color=COLOURS[kind], fontsize=8)  # fmt: skip
    if "cone, auto" in arms:
        losses = arms["cone, auto"]["target loss"]
        mean, sd = statistics.mean(losses), _sd(losses)
        axis.axhline(mean, color="black", ls="--", label="cone, auto")
        axis.axhspan(mean - sd, mean + sd, color="black", alpha=0.12)
    axis.set(xlabel="constant α (share of t)", ylim=(bottom, bottom + HEIGHT))
    axis.set_xticks(range(len(places)), [f"{alpha:g}" for alpha in places])
    axis.grid(alpha=0.3)


def _chosen(axis: Any, arms: dict[str, Any]) -> None:
    for alphas, seed in zip(
        *(arms.get("cone, auto", {}).get(k, []) for k in ("alpha", "seeds")), strict=True
    ):
        axis.plot(range(1, len(alphas) + 1), alphas, color="black", alpha=1.2 - 0.3 * min(seed, 3),
                  label=f"chosen by auto, seed {seed}")  # fmt: skip
    points = _constant(arms, "cone")
    if points:
        best = min(points, key=lambda alpha: statistics.mean(points[alpha]))
        axis.axhline(best, color=COLOURS["cone"], ls=":", label="best constant α of the cone")
    axis.set(xlabel="training step", ylim=(-0.03, 0.65))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _constant(arms: dict[str, Any], kind: str) -> dict[float, list[float]]:
    """alpha -> final losses."""
    return {float(name.split(", ")[1]): arm["target loss"] for name, arm in arms.items()
            if name.startswith(kind) and "auto" not in name}  # fmt: skip


def _sd(numbers: list[float]) -> float:
    return statistics.stdev(numbers) if len(numbers) > 1 else 0.0
