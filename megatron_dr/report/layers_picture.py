"""Which layers carry weight, and whether the same samples do: two panels of bars."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

from megatron_dr.report.weights import Layer

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: E402


def draw(by_layer: Mapping[str, Layer], by_type: Mapping[str, Layer], path: Path) -> None:
    """By layer, and by type: distance from the plain mean, and rank correlation with the whole."""
    height = 1.6 + 0.24 * (len(by_layer) + len(by_type))
    sizes = [len(by_layer), len(by_type)]
    figure, axes = plt.subplots(
        2, 2, figsize=(9, height), layout=ConstrainedLayoutEngine(wspace=0.06), sharex="col",
        sharey="row", gridspec_kw={"height_ratios": sizes},
    )  # fmt: skip
    for row, found in zip(axes, (by_layer, by_type), strict=True):
        moved = [layer.moved for layer in found.values()]
        ranks = [layer.spearman for layer in found.values()]
        _bars(row[0], found, moved, "C0")
        _bars(row[1], found, ranks, "C1")
    axes[1, 0].set_xlabel("mean |weight − 1|: how far from the plain mean")
    axes[1, 1].set_xlabel("Spearman with the weights of all blocks")
    axes[1, 1].axvline(0, color="gray", lw=0.8)
    axes[0, 1].axvline(0, color="gray", lw=0.8)
    axes[1, 1].set_xlim(right=1.0)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _bars(axis: Any, names: Mapping[str, Layer], values: list[float], color: str) -> None:
    """NaN has no bar, and says so."""
    places = range(len(values))
    axis.barh(places, [0.0 if math.isnan(v) else v for v in values], color=color)
    for place, value in zip(places, values, strict=True):
        if math.isnan(value):
            axis.text(0.0, place, " constant", va="center", fontsize=7)
    axis.set_yticks(places, list(names), fontsize=8)
    axis.set_ylim(len(values) - 0.5, -0.5)
