"""The picture of a table: a panel for each case, target against general loss of all arms."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measures import AUTO, Found

from megatron_dr.compare import figures
from megatron_dr.compare.pictures import plt

COLOURS = {
    "general": "tab:gray", "target": "black", "sequential": "tab:brown", "mix": "tab:blue",
    "topk": "tab:purple", "filter": "tab:olive", "samples": "tab:green", "cone": "tab:red",
    AUTO: "tab:orange",
}  # fmt: skip
LINES = {"mix": ("general", "mix"), "cone": ("cone",)}  # families that a line runs through
COLUMNS = 3


def draw(all_found: Sequence[Found], title: str, path: Path) -> None:
    """Small marks: all dials. Large ones: the best by validation, with standard errors."""
    columns = min(COLUMNS, len(all_found))
    rows = math.ceil(len(all_found) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 4.4 * rows + 0.8),
                                layout="constrained", squeeze=False)  # fmt: skip
    for axis, found in zip(axes.flat, all_found, strict=False):
        _panel(axis, found)
    for axis in axes.flat[len(all_found) :]:
        axis.axis("off")
    known = {}
    for axis in axes.flat:
        known |= {text: mark for mark, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=9, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, found: Found) -> None:
    for family, through in LINES.items():
        points = [arm.point for name in through for arm in found.arms if arm.family == name]
        axis.plot([g for _, g in points], [t for t, _ in points], "-", color=COLOURS[family],
                  alpha=0.5, linewidth=1)  # fmt: skip
    for arm in found.arms:
        axis.plot(arm.point[1], arm.point[0], ".", color=COLOURS[arm.family], alpha=0.5)
    for family, arm in found.best.items():
        x, y = arm.point[1], arm.point[0]
        star = family == AUTO
        axis.errorbar(x, y, xerr=_error(arm.general), yerr=_error(arm.target), label=family,
                      color=COLOURS[family], marker="*" if star else "o", capsize=2, ls="none",
                      markersize=15 if star else 6, zorder=3 if star else 2)  # fmt: skip
    left, right, low, high = _window(found)
    outside = [arm for arm in found.arms
               if not (left < arm.point[1] < right and low < arm.point[0] < high)]  # fmt: skip
    axis.set(xlim=(left, right), ylim=(low, high), xlabel="general test loss (nats per byte)",
             ylabel="target test loss (nats per byte)")  # fmt: skip
    note = f"\n{len(outside)} of {len(found.arms)} arms lie outside" if outside else ""
    axis.set_title(f"{found.case.name}: {found.case.title}\n{len(found.seeds)} seed(s){note}",
                   fontsize=9)  # fmt: skip
    axis.grid(alpha=0.3)


def _error(values: Sequence[float]) -> float | None:
    return figures.standard_error(values)


def _window(found: Found) -> tuple[float, float, float, float]:
    """Around the best arms of the families that use both roles in every step."""
    outer = ("target", "sequential", "general")
    inner = [arm for family, arm in found.best.items() if family not in outer]
    shown = [arm.point for arm in inner or found.arms]
    low, high = min(t for t, _ in shown), max(t for t, _ in shown)
    most_left = [found.best["general"].point[1]] if "general" in found.best else []
    left, right = min([*most_left, *(g for _, g in shown)]), max(g for _, g in shown)
    up, across = max(high - low, 0.05), max(right - left, 0.05)
    return left - 0.2 * across, right + 0.3 * across, low - 0.3 * up, high + 0.9 * up
