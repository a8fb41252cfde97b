"""One self-contained page of a run, or of several laid over each other."""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from megatron_dr.cli import pages, report_data
from megatron_dr.cli.report_data import Weights
from megatron_dr.report import charts, panels, status, tables
from megatron_dr.report.charts import Key
from megatron_dr.report.panels import Panel
from megatron_dr.report.run_log import RunLog
from megatron_dr.report.tables import Table

BLOCKS = "Blocks"
_PHASES = "The plugin's own work, by phase"
_MAPS = (  # of blocks' figures: name, title, unit, whether it has two signs
    ("dr cos update", "Cosine of the update with the target", "cosine", True),
    ("dr cos general", "Cosine of the mean general gradient with the target", "cosine", True),
    ("dr rows", "Effective rows", "rows", False),
    ("dr zero rows", "Rows of weight 0", "rows", False),
    ("dr residual", "Distance of d from t", "lengths of t", False),
)


@dataclass
class Figure:
    """A picture with its legend, notes, and its numbers in a table."""

    title: str
    svg: Markup
    keys: list[Key] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    table: Table | None = None


@dataclass
class Section:
    """Of the page, with a link of its own."""

    title: str
    figures: list[Figure] = field(default_factory=list)
    tables: list[tuple[str, Table]] = field(default_factory=list)
    data: list[tuple[str, Weights]] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower())


def text(runs: Sequence[RunLog]) -> str:
    """The page; of several runs the first is the one that the others are compared with."""
    names = [run.name for run in runs]
    found: dict[str, Section] = {}
    for panel in panels.panels(runs):
        section = found.setdefault(panel.section, Section(panel.section))
        section.figures.append(_phases(panel, names) if panel.title == _PHASES
                               else _figure(panel, names))  # fmt: skip
    if data := _data(runs):
        found[data.title] = data
    maps = [figure for run in runs for figure in _maps(run, len(runs) > 1)]
    order = [*found.values(), *([Section(BLOCKS, maps)] if maps else [])]
    order.sort(key=lambda section: section.title == panels.OTHERS)
    if (once := tables.results(runs)).rows:
        order.append(Section("Results", tables=[("Tests, answers, the best checkpoint", once)]))
    return pages.template("report", named=charts.named).render(
        title=", ".join(names), sections=order, losses=tables.losses(runs),
        runs=[{"name": run.name, "status": status.sentence(run), "flags": tables.flags(run),
               "about": tables.about(run), "colour": charts.style(number, 0, len(runs))[0]}
              for number, run in enumerate(runs)],
        several=len(runs) > 1,
    )  # fmt: skip


def _data(runs: Sequence[RunLog]) -> Section | None:
    """Each run's corpora and samples, where any has a record of them."""
    section = Section(report_data.TITLE)
    for run in runs:
        weights = report_data.weights_of(run)
        if weights is None:
            continue
        section.data.append((run.name, weights))
        for panel in weights.panels:
            panel.title = f"{run.name}: {panel.title}" if len(runs) > 1 else panel.title
            section.figures.append(_figure(panel, [run.name]))
    return section if section.data else None


def _figure(panel: Panel, names: Sequence[str]) -> Figure:
    svg = Markup(charts.lines(panel, len(names)))
    return Figure(panel.title, svg, charts.keys(panel, names), _notes(panel, names),
                  tables.of_panel(panel, names))  # fmt: skip


def _phases(panel: Panel, names: Sequence[str]) -> Figure:
    """Of one run over its steps; of several each run's median."""
    keys = [Key(label, charts.style(0, n, 1)[0], "") for n, label in enumerate(panel.labels)]
    if len(names) == 1:
        svg, notes = charts.areas(panel), _notes(panel, names)
    else:
        of = {(run, label): statistics.median(curve.values) for run, label, curve in panel.curves}
        parts = {label: [of.get((run, label), 0.0) for run in range(len(names))]
                 for label in panel.labels}  # fmt: skip
        svg, notes = charts.bars(names, parts, panel.unit, panel.title), ["Medians over steps."]
    return Figure(panel.title, Markup(svg), keys, notes, tables.of_panel(panel, names))


def _notes(panel: Panel, names: Sequence[str]) -> list[str]:
    """What a curve does not show by itself."""
    said = []
    for number, label, curve in panel.curves:
        if curve.not_finite:
            where = f"{names[number]}: {label}" if len(names) > 1 else label
            steps = ", ".join(map(str, curve.not_finite[:5])) + ", …" * (len(curve.not_finite) > 5)
            said.append(f"{where} is no finite number at {len(curve.not_finite)} of "
                        f"{len(curve.values)} steps: {steps}")  # fmt: skip
    means = max(curve.thinned(charts.MOST)[1] for _, _, curve in panel.curves)
    if means > 1:
        said.append(f"Points are means of up to {means} values.")
    return said


def _maps(run: RunLog, several: bool) -> list[Figure]:
    found = []
    for name, title, unit, diverges in _MAPS:
        steps, values = run.of_blocks(name)
        if not steps:
            continue
        names = [re.sub(r"^decoder\.|\.weight$", "", block).replace("layers.", "layer ")
                 for block in run.blocks]  # fmt: skip
        title = f"{run.name}: {title}" if several else title
        svg = charts.heat_map(title, unit, names, steps, values, diverges)
        bad = sum(not math.isfinite(v) for of_step in values for v in of_step)
        notes = [f"Grey: no finite number, {bad} of {len(steps) * len(run.blocks)}."] * bool(bad)
        table = _of_map(run.blocks, values)
        found.append(Figure(title, Markup(svg), [], notes, table))
    return found


def _of_map(names: Sequence[str], values: Sequence[Sequence[float]]) -> Table:
    columns: list[Any] = list(zip(*values, strict=True))
    rows = [
        [name, *map(tables.number, (of[0], of[-1], statistics.fmean(of)))]
        for name, of in zip(names, columns, strict=True)
    ]
    return Table(["block", "first", "last", "mean"], rows, 1)
