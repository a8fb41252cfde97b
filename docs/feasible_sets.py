"""Draws the pictures of feasible-sets.md from the classes themselves, in two dimensions.

    python docs/feasible_sets.py [folder]        # docs/sets unless a folder is given

A gradient has two elements here, so that a set of updates can be seen. Each picture asks a class
for its weights at the rows' gram and the target's cross, as a training step does. A convex set is
shaded where the class, without its ridge, returns the point that it is given.

Shape suffixes: M rows, 2 elements, B blocks (here: points to be projected).
"""

import dataclasses
import functools
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from megatron_dr.projection import (
    Ball,
    Capped,
    Cone,
    FeasibleSet,
    Filter,
    Greedy,
    Halfspace,
    Hull,
    Mean,
    Span,
    Target,
    TopK,
    norm_scale,
)

Vectors = tuple[tuple[float, float], ...]

ROWS: Vectors = ((1.5, 0.2), (1.3, 0.9), (0.5, 1.3), (-0.5, 0.9))
TARGET = (0.6, -0.8)
LINE: Vectors = ((1.2, 0.6), (0.4, 0.2))  # on one line, so that the span is less than the plane
TWINS: Vectors = ((1.35, 0.3), (1.4, -0.2), (0.05, 1.4), (-0.7, 0.8))  # the first two much alike
X, Y = (-1.15, 2.0), (-1.3, 1.75)
GRID, EDGE = 81, 0.02  # points along an axis; the distance that still counts as inside
ROW, MEAN, PROJECTION, SET = "tab:blue", "navy", "tab:red", "tab:orange"


@dataclass(frozen=True)
class Panel:
    title: str
    set: FeasibleSet
    rows: Vectors = ROWS
    target: tuple[float, float] = TARGET


SHEET = [
    Panel("mean", Mean()), Panel("target", Target()), Panel("topk, f = 1/2", TopK(0.5)),
    Panel("greedy, f = 1/2", Greedy(0.5)), Panel("filter, f = 1/2", Filter(0.5)),
    Panel("capped, f = 1/2", Capped(0.5)), Panel("hull", Hull()), Panel("cone", Cone()),
    Panel("span", Span()), Panel("ball, r = 1/2", Ball(0.5)), Panel("halfspace", Halfspace()),
]  # fmt: skip

PICTURES = {
    "topk": [Panel(f"f = {name}", TopK(f)) for name, f in (("1", 1), ("1/2", 0.5), ("1/4", 0.25))],
    "greedy": [
        Panel("topk, f = 1/2, alike rows", TopK(0.5), TWINS, (1.1, 0.9)),
        Panel("greedy, f = 1/2, alike rows", Greedy(0.5), TWINS, (1.1, 0.9)),
    ],
    "filter": [
        Panel("f = 1/2: the worse of two dropped", Filter(0.5)),
        Panel("f = 1: both dropped", Filter(1.0)),
        Panel("f = 1, all opposed: $d$ = 0", Filter(1.0), ROWS, (-0.4, -1.0)),
    ],
    "capped": [
        Panel("f = 1: mean", Capped(1.0)), Panel("f = 3/4", Capped(0.75)),
        Panel("f = 1/2", Capped(0.5)), Panel("f = 1/M: hull", Capped(0.25)),
    ],
    "hull": [Panel(f"ridge {r:g}", Hull(r)) for r in (0.0, 0.3, 3.0)],
    "cone": [Panel(f"ridge {r:g}", Cone(r)) for r in (0.0, 0.3, 3.0)],
    "span": [
        Panel("rows on one line, ridge 0", Span(), LINE), Panel("ridge 0", Span()),
        Panel("ridge 0.3", Span(0.3)), Panel("ridge 3", Span(3.0)),
    ],
    "ball": [Panel(f"r = {r:g}", Ball(r)) for r in (0.25, 0.5, 1.0)],
    "halfspace": [
        Panel("$t$ agrees with the mean: $d$ = $t$", Halfspace(), ROWS, (1.1, -0.5)),
        Panel("$t$ opposes it", Halfspace()),
    ],
}  # fmt: skip


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sheet(folder / "all.png")
    for name, panels in PICTURES.items():
        figure, axes = plt.subplots(
            1, len(panels), figsize=(3.3 * len(panels), 3.9), layout="constrained", squeeze=False
        )
        for axis, panel in zip(axes[0], panels, strict=True):
            draw(axis, panel)
        figure.legend(handles=legend(), loc="outside lower center", ncols=6, frameon=False)
        save(figure, folder / f"{name}.png")
    dials(folder / "dials.png")


def sheet(path: Path) -> None:
    """Every set with the same rows and target."""
    figure, axes = plt.subplots(3, 4, figsize=(13, 11), layout="constrained")
    for axis, panel in zip(axes.flat, SHEET, strict=False):
        draw(axis, panel)
    last = axes.flat[-1]
    last.axis("off")
    last.legend(handles=legend(), loc="center", frameon=False, fontsize=13)
    save(figure, path)


def legend() -> list[Line2D | Patch]:
    def line(colour: str, label: str, **style: object) -> Line2D:
        return Line2D([], [], color=colour, label=label, **style)  # type: ignore[arg-type]

    return [
        line(ROW, "rows $g_i$", lw=1.5),
        line(MEAN, "their mean", marker="o", lw=0),
        line("black", "target $t$", lw=2),
        Patch(color=SET, alpha=0.3, label="the set"),
        line(SET, "means of $k$ rows", marker="D", lw=0),
        line(PROJECTION, "projection $d$", lw=2.5),
    ]


def draw(axis: Axes, panel: Panel) -> None:
    """Rows, mean, set, target and projection; the weights below the title."""
    rows_M2, target_2 = torch.tensor(panel.rows).double(), torch.tensor(panel.target).double()
    (d_2,), (w_M,) = project(panel.set, rows_M2, target_2[None])
    shade(axis, panel.set, panel.rows)
    for number, (row_2, weight) in enumerate(zip(rows_M2, w_M, strict=True), 1):
        left_out = abs(weight) < 1e-6 and not panel.set.target_weight
        arrow(axis, row_2, ROW, 1.5, alpha=0.35 if left_out else 1.0)
        name(axis, row_2, f"$g_{number}$", ROW)
    axis.plot(*rows_M2.mean(0), "o", color=MEAN, zorder=5)
    axis.plot(*torch.stack([target_2, d_2]).T, ":", color="grey", zorder=4)
    arrow(axis, target_2, "black", 2.0)
    name(axis, target_2, "$t$", "black")
    arrow(axis, d_2, PROJECTION, 2.5)
    if d_2.norm() < 1e-6:
        axis.plot(0, 0, "o", color=PROJECTION, zorder=5)
    elif (d_2 - target_2).norm() > 0.2:
        name(axis, d_2, "$d$", PROJECTION, beside(d_2, target_2, rows_M2))
    weights = "  ".join(f"{weight + 0.0:.2f}" for weight in w_M)  # no minus before a zero
    plus = " , plus $t$" if panel.set.target_weight else ""
    axis.set_title(f"{panel.title}\n$w$ = {weights}{plus}", fontsize=10)
    frame(axis)


def frame(axis: Axes) -> None:
    axis.set(xlim=X, ylim=Y, aspect="equal", xticks=[], yticks=[])
    axis.axhline(0, color="lightgrey", lw=0.8, zorder=0)
    axis.axvline(0, color="lightgrey", lw=0.8, zorder=0)


def project(
    set_: FeasibleSet, rows_M2: torch.Tensor, points_B2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """d [B, 2] and w [B, M] of many targets, from inner products alone."""
    gram_MM, cross_BM = rows_M2 @ rows_M2.T, points_B2 @ rows_M2.T
    w_BM = set_.weights(gram_MM.expand(len(points_B2), -1, -1), cross_BM)
    return w_BM @ rows_M2 + set_.target_weight * points_B2, w_BM


def shade(axis: Axes, set_: FeasibleSet, rows: Vectors) -> None:
    """Where projecting a point gives that point; of the sets of means, the means."""
    if isinstance(set_, (Mean, TopK, Greedy, Capped)):
        means(axis, torch.tensor(rows), getattr(set_, "fraction", 1.0))
    if isinstance(set_, (Mean, TopK, Greedy, Filter)):
        return
    bare = dataclasses.replace(set_, ridge=0.0) if hasattr(set_, "ridge") else set_
    x, y, away = distances(bare, rows)
    axis.contourf(x, y, away, levels=[-1, EDGE], colors=[SET], alpha=0.3, zorder=1)
    if away.min() < EDGE < away.max():
        axis.contour(x, y, away, levels=[EDGE], colors=[SET], linewidths=1, zorder=1)


@functools.cache
def distances(set_: FeasibleSet, rows: Vectors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, y and how far the set is from each point of their grid [y, x]."""
    x, y = (torch.linspace(*ends, GRID, dtype=torch.float64) for ends in (X, Y))
    points_B2 = torch.cartesian_prod(x, y)
    away_B = (project(set_, torch.tensor(rows).double(), points_B2)[0] - points_B2).norm(dim=1)
    return x, y, away_B.view(GRID, GRID).T


def means(axis: Axes, rows_M2: torch.Tensor, fraction: float) -> None:
    """The means of all subsets of this share of the rows."""
    kept = max(1, int(fraction * len(rows_M2)))
    subsets = itertools.combinations(range(len(rows_M2)), kept)
    points_B2 = torch.stack([rows_M2[list(subset)].mean(0) for subset in subsets])
    axis.plot(*points_B2.T, "D", color=SET, ms=6, zorder=3)


def arrow(axis: Axes, tip_2: torch.Tensor, colour: str, width: float, alpha: float = 1.0) -> None:
    axis.annotate(
        "", tip_2.tolist(), (0, 0), zorder=4,
        arrowprops={
            "arrowstyle": "-|>,head_width=0.28,head_length=0.5", "color": colour, "lw": width,
            "alpha": alpha, "shrinkA": 0, "shrinkB": 0,
        },
    )  # fmt: skip


def name(
    axis: Axes, tip_2: torch.Tensor, text: str, colour: str, towards_2: torch.Tensor | None = None
) -> None:
    """Text a little beyond the tip, or beside it."""
    towards_2 = tip_2 if towards_2 is None else towards_2
    place_2 = tip_2 + 0.16 * towards_2 / towards_2.norm().clamp(min=0.1)
    halo = [withStroke(linewidth=2.5, foreground="white", alpha=0.8)]
    style = {"ha": "center", "va": "center", "zorder": 6, "path_effects": halo}
    axis.text(*place_2.tolist(), text, color=colour, **style)


def beside(d_2: torch.Tensor, target_2: torch.Tensor, rows_M2: torch.Tensor) -> torch.Tensor:
    """Across d and a little forward, on the side with more room."""
    across_2, to_target_2 = torch.stack([-d_2[1], d_2[0]]), target_2 - d_2
    sides_22 = torch.stack([across_2, -across_2]) + 0.4 * d_2
    texts_22 = d_2 + 0.16 * sides_22 / sides_22.norm(dim=1, keepdim=True)
    near_2 = d_2 + 0.2 * to_target_2 / to_target_2.norm()
    taken_2 = torch.cat([rows_M2, rows_M2.mean(0, keepdim=True), near_2[None]])
    return sides_22[torch.cdist(texts_22, taken_2).amin(1).argmax()]


def dials(path: Path) -> None:
    """The norm rule, then alpha: what is done to d after the projection."""
    rows_M2, target_2 = torch.tensor(ROWS).double(), torch.tensor((1.0, -1.0)).double()
    (d_2,), w_1M = project(Cone(), rows_M2, target_2[None])
    vectors_R2 = torch.cat([rows_M2, target_2[None]])
    gram_1RR = (vectors_R2 @ vectors_R2.T)[None]
    direction_1R = torch.cat([w_1M, torch.zeros(1, 1)], 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 4.6), layout="constrained")
    for rule, colour in (("target", "tab:green"), ("general", "tab:purple"), ("none", PROJECTION)):
        scaled_2 = norm_scale(rule, gram_1RR, direction_1R) * d_2
        arrow(left, scaled_2, colour, 2.5)
        length = scaled_2.norm().item()
        left.plot([], [], color=colour, lw=2.5, label=f"{rule}: length {length:.2f}")
    for alpha, colour in ((0.5, "tab:brown"), (0.2, "tab:pink"), (0.0, PROJECTION)):
        arrow(right, (1 - alpha) * d_2 + alpha * target_2, colour, 2.5)
        right.plot([], [], color=colour, lw=2.5, label=f"alpha = {alpha:g}")
    right.plot(*torch.stack([d_2, target_2]).T, ":", color="grey", zorder=4)
    left.set_title("the norm rule sets the length of $d$", fontsize=10)
    right.set_title("(1 - alpha) $d$ + alpha $t$, norm rule none", fontsize=10)
    for axis in (left, right):
        shade(axis, Cone(), ROWS)
        axis.plot(*rows_M2.mean(0), "o", color=MEAN, zorder=5)
        name(axis, rows_M2.mean(0), "mean", MEAN)
        arrow(axis, target_2, "black", 2.0)
        name(axis, target_2, "$t$", "black")
        axis.legend(loc="upper right", fontsize=9)
        frame(axis)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "sets"))
