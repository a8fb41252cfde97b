"""Panels as SVG that stands inside a page: text and axes have the page's own colour, so that they
can be read on a dark page, too.

Shape suffixes: S steps, B blocks or other names.
"""

import hashlib
import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_dr.report.panels import Panel
from megatron_dr.report.run_log import Curve

# Okabe and Ito's colours: told apart by colour-blind readers too
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#999999")
DASHES = ("", "6 3", "2 2", "8 3 2 3")  # of lines, as SVG has them
_INK = "#010203"  # becomes the page's
_WIDTH, _HEIGHT = 4.6, 2.6  # inches of 72 units
MOST = 300  # points of a line, columns of a map
_RC: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "megatron_dr", "text.parse_math": False,
    "font.size": 9, "axes.titlesize": 9, "axes.edgecolor": _INK, "axes.labelcolor": _INK,
    "text.color": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none",
    "figure.facecolor": "none", "axes.formatter.limits": (-3, 4), "axes.unicode_minus": False,
}  # fmt: skip
_FONT = "system-ui, sans-serif"
Array = np.ndarray[Any, np.dtype[Any]]
_BAD = "#8a8a8a"  # a place of a map without a number


class Key(NamedTuple):
    """A line of a legend; the colour's number in `PALETTE`."""

    label: str
    colour: int
    dashes: str


def named(colour: int) -> str:
    """A colour of `PALETTE` as a page's style sheet calls it, which is lighter on a dark page."""
    return f"var(--c{colour % len(PALETTE)})"


def points(curve: Curve) -> tuple[Array, Array]:
    """Steps [S] and values [S] to draw; what is no finite number is NaN."""
    drawn, _ = curve.thinned(MOST)
    values_S = np.asarray(drawn.values)
    return np.asarray(drawn.steps), np.where(np.isfinite(values_S), values_S, np.nan)


def keys(panel: Panel, runs: Sequence[str]) -> list[Key]:
    """A colour for each label; or where there are several runs, for each run, and dashes for
    labels."""
    labels = panel.labels
    if len(runs) == 1:
        return [Key(label, *style(0, n, 1)) for n, label in enumerate(labels)]
    return [
        Key(f"{runs[number]}: {label}" if len(labels) > 1 else runs[number],
            *style(number, labels.index(label), len(runs)))
        for number, label, _ in panel.curves
    ]  # fmt: skip


def style(run: int, label: int, runs: int) -> tuple[int, str]:
    """Colour and dashes of a line."""
    n = len(PALETTE)
    if runs == 1:
        return label % n, DASHES[label // n % len(DASHES)]
    return run % n, DASHES[label % len(DASHES)]


def lines(panel: Panel, runs: int) -> str:
    """Curves over steps."""
    with matplotlib.rc_context(_RC):
        figure, axis = _axis(panel.unit)
        for number, label, curve in panel.curves:
            colour, dashes = style(number, panel.labels.index(label), runs)
            steps, values = points(curve)
            dash = (0, [float(x) / 1.4 for x in dashes.split()]) if dashes else "-"
            mark = "o" if len(steps) <= 12 else _lonely(values)
            axis.plot(steps, values, color=PALETTE[colour], ls=dash, lw=1.4, marker=mark, ms=3)
        finite = [v for _, _, c in panel.curves for v in c.values if math.isfinite(v)]
        if panel.log and finite and min(finite) > 0 and max(finite) > 100 * min(finite):
            axis.set_yscale("log")
        elif finite and min(finite) > 0 and max(finite) < 1.05 * min(finite):
            axis.set_ylim(0, 1.2 * max(finite))  # what hardly changes is not blown up
        return _svg(figure, f"{panel.title}: {', '.join(panel.labels)}")


def _lonely(values: Array) -> str:
    """A marker where a number between two that are none would not be seen."""
    known = np.isfinite(values)
    beside = np.append(known[1:], False) | np.append(False, known[:-1])
    return "." if (known & ~beside).any() else ""


def areas(panel: Panel) -> str:
    """Parts of a whole over steps, of one run; the steps that have them all."""
    curves = {label: dict(zip(curve.steps, curve.values, strict=True))
              for _, label, curve in panel.curves}  # fmt: skip
    steps = sorted({step for of in curves.values() for step in of})
    whole = {
        label: points(Curve(steps, [of.get(step, 0.0) for step in steps]))
        for label, of in curves.items()
    }
    with matplotlib.rc_context(_RC):
        figure, axis = _axis(panel.unit)
        colours = [PALETTE[style(0, number, 1)[0]] for number in range(len(whole))]
        axis.stackplot(next(iter(whole.values()))[0], [of[1] for of in whole.values()],
                       colors=colours, alpha=0.85, lw=0)  # fmt: skip
        axis.set_ylim(bottom=0)
        return _svg(figure, f"{panel.title}: {', '.join(whole)}")


def bars(names: Sequence[str], parts: dict[str, list[float]], unit: str, title: str) -> str:
    """A bar of parts for each run.

    Args:
        parts: each part's size for every name.
    """
    with matplotlib.rc_context(_RC):
        figure = Figure((_WIDTH, 0.9 + 0.35 * len(names)), layout="constrained")
        axis = figure.add_subplot()
        left = np.zeros(len(names))
        for number, sizes in enumerate(parts.values()):
            axis.barh(range(len(names)), sizes, left=left,
                      color=PALETTE[style(0, number, 1)[0]])  # fmt: skip
            left += np.asarray(sizes)
        axis.set(xlabel=unit, yticks=range(len(names)), yticklabels=map(_short, names))
        axis.invert_yaxis()
        return _svg(figure, title)


def heat_map(
    title: str, unit: str, names: Sequence[str], steps: Sequence[int],
    values: Sequence[Sequence[float]], diverges: bool,
) -> str:  # fmt: skip
    """Names by steps.

    Args:
        values: at each step one for each name.
        diverges: of two signs: 0 has no colour.
    """
    value_BS = np.asarray(values, float).T
    columns = [points(Curve(list(steps), list(of)))[1] for of in value_BS]
    shown_BS = np.ma.masked_invalid(np.stack(columns))
    most = float(np.abs(shown_BS).max()) if shown_BS.count() else 1.0
    low, high = (-most or -1.0, most or 1.0) if diverges else (None, None)
    colours = matplotlib.colormaps["RdBu_r" if diverges else "viridis"].with_extremes(bad=_BAD)
    with matplotlib.rc_context(_RC):
        height = min(0.9 + 0.16 * max(len(names), 6), 7.0)
        figure = Figure((_WIDTH, height), layout="constrained")
        axis = figure.add_subplot()
        edge = (steps[-1] - steps[0]) / max(len(steps) - 1, 1) / 2 or 0.5
        image = axis.imshow(
            shown_BS, aspect="auto", cmap=colours, interpolation="nearest", vmin=low, vmax=high,
            extent=(steps[0] - edge, steps[-1] + edge, len(names) - 0.5, -0.5),
        )  # fmt: skip
        every = math.ceil(len(names) / max(int(height * 6), 1))
        at = range(0, len(names), every)
        axis.set(yticks=at, yticklabels=[_short(names[n]) for n in at], xlabel="step")
        axis.tick_params(axis="y", labelsize=7, length=0)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        scale = figure.colorbar(image, ax=axis, pad=0.02, aspect=25, label=unit)
        assert scale.solids is not None
        scale.solids.set_rasterized(True)
        scale.outline.set_visible(False)
        return _svg(figure, f"{title}: {len(names)} rows, steps {steps[0]} to {steps[-1]}")


def _short(name: str, most: int = 26) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _axis(unit: str) -> tuple[Figure, Any]:
    figure = Figure((_WIDTH, _HEIGHT), layout="constrained")
    axis = figure.add_subplot()
    axis.set(xlabel="step", ylabel=unit)
    axis.grid(color=_INK, alpha=0.15, lw=0.6)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    return figure, axis


def _svg(figure: Figure, said: str) -> str:
    """The picture as a page has it: its names are no other picture's, nothing leads out of it."""
    with warnings.catch_warnings(), io.StringIO() as file:
        warnings.simplefilter("ignore")  # letters that the font to measure with has not
        figure.savefig(file, format="svg", dpi=144, metadata={"Date": None})
        text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.S)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", rf"font: \1 {_FONT}", text)
    text = _renamed(text, f"p{hashlib.sha256((said + text).encode()).hexdigest()[:10]}-")
    head = re.search(r'viewBox="[^"]*"', text)
    assert head
    body = text[text.index(">") + 1 :].replace(_INK, "currentColor")
    for number, colour in enumerate(PALETTE):
        body = body.replace(f": {colour}", f": {named(number)}")
    label = said.translate({ord(c): f"&#{ord(c)};" for c in "&<>\"'"})
    return f'<svg {head[0]} role="img" aria-label="{label}">{body}'


def _renamed(text: str, own: str) -> str:
    """With names that begin so, of what is referred to; nothing else needs one."""
    asked = set(re.findall(r'(?:url\(#|xlink:href="#)([^")]+)', text))

    def name(found: re.Match[str]) -> str:
        if found[1] not in asked:
            return ""
        asked.discard(found[1])  # once, should it be there again
        return f' id="{own}{found[1]}"'

    text = re.sub(r'\sid="([^"]*)"', name, text)
    return re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{own}", text)
