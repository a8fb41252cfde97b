"""A page's section on data: what weight corpora and samples had, of a run with --dr-record."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dr.report.panels import Panel
from megatron_dr.report.run_log import Curve, RunLog
from megatron_dr.report.tables import Table, number

TITLE = "Corpora and samples"
_TOP = 10  # samples at either end
_MEANS = (
    ("weight", "Mean weight by corpus", "weight"),
    ("score", "Mean cosine with the target by corpus", "cosine"),
)
_LONG = 4000  # letters of a text


@dataclass
class Shown:
    """A sample: its figures, where it is from, its text or why there is none."""

    figures: str
    where: str
    text: str
    is_text: bool


@dataclass
class Weights:
    """What a run's record says.

    Attributes:
        lists: (title, samples).
        why: there is nothing to show.
    """

    notes: list[str] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    corpora: Table | None = None
    lists: list[tuple[str, list[Shown]]] = field(default_factory=list)
    why: str = ""


def folder_of(run: RunLog) -> Path | None:
    """Where its record is: where it was written, or beside the metrics, with which it was moved."""
    given = run.about.get("record")
    if not given:
        return None
    beside = run.path.parent / Path(given).name
    return beside if beside.is_dir() and not Path(given).is_dir() else Path(given)


def weights_of(run: RunLog) -> Weights | None:
    """None of a run without a record."""
    folder = folder_of(run)
    if folder is None:
        return None
    from megatron_dr.report import record, weights

    try:
        table = record.read(folder)
    except ValueError as error:
        return Weights(why=str(error))
    note = record.about(table)
    steps = table["step"].to_pylist()
    blocks = len(table["block"].unique())
    said = [f"{len(table):,} rows of {blocks:,} block(s) in steps {min(steps)} to {max(steps)}. A "
            "weight of 1 is what a row has in the plain mean."]  # fmt: skip
    if note["left_out"]:
        said.append(f"{note['left_out']:,} rows between the most and the least weight are not in "
                    "the record (--dr-record-rows): means are of those that are.")  # fmt: skip
    base = str(run.about.get("folder") or "")
    lists, bad = _lists(weights.samples(table).to_pylist(), note["files"], base)
    if bad:
        said.append(f"{bad:,} samples whose weight is no finite number are in no list.")
    panels = [_panel(table, *of) for of in _MEANS]
    return Weights(said, [panel for panel in panels if panel.curves],
                   _corpora(weights.corpora(table).to_pylist()), lists)  # fmt: skip


def _panel(table: Any, column: str, title: str, unit: str) -> Panel:
    """A corpus' mean at each recorded step."""
    means = table.group_by(["corpus", "step"], use_threads=False).aggregate([(column, "mean")])
    points: dict[str, list[tuple[int, float]]] = {}
    for row in means.to_pylist():
        if row[f"{column}_mean"] is not None:
            points.setdefault(_corpus(row), []).append((row["step"], row[f"{column}_mean"]))
    curves = []
    for name, of in sorted(points.items()):
        steps, values = zip(*sorted(of), strict=True)
        curves.append((0, name, Curve(list(steps), list(values))))
    return Panel(TITLE, title, unit, curves)


def _corpora(rows: Sequence[dict[str, Any]]) -> Table:
    head = ["corpus", "mean weight", "share of all weight", "mean cosine", "rows"]
    found = [
        [_corpus(row), number(row["weight"]), number(row["share"]), _maybe(row["score"]),
         f"{row['rows']:,}"] for row in rows
    ]  # fmt: skip
    return Table(head, found, 1)


def _corpus(row: dict[str, Any]) -> str:
    return row["corpus"] or row.get("file") or "(not known, or several)"


def _maybe(value: float | None) -> str:
    return "" if value is None else number(value)


def _lists(
    samples: Sequence[dict[str, Any]], sources: dict[str, str], base: str
) -> tuple[list[tuple[str, list[Shown]]], int]:
    """Those of the most and of the least weight, and how many have none that is finite."""
    from megatron_dr.report.texts import texts

    known = [one for one in samples if math.isfinite(one["weight"]) and one["hash"] is not None]
    bad = sum(not math.isfinite(one["weight"]) for one in samples)
    most, least = known[:_TOP], known[_TOP:][: -_TOP - 1 : -1]
    found = []
    for title, chosen in (("Samples of most weight", most), ("Samples of least weight", least)):
        each = zip(chosen, texts(chosen, sources, base), strict=True)
        if chosen:
            found.append((title, [_shown(one, *of) for one, of in each]))
    return found, bad


def _shown(sample: dict[str, Any], text: str, is_text: bool) -> Shown:
    from megatron_dr.report.texts import place_of

    place, score = place_of(sample), sample["score"]
    figures = [f"weight {number(sample['weight'])}"]
    figures += [] if score is None else [f"cosine {number(score)}"]
    figures += [f"{sample['rows']:,} row{'s' * (sample['rows'] != 1)}"]
    where = [f"{place.file}, line {place.line}"] if place else []
    where += [f"id {sample['id']}"] if sample["id"] and sample["line"] is not None else []
    cut = text if len(text) <= _LONG else f"{text[:_LONG]} …"
    return Shown(", ".join(figures), ", ".join(where), cut, is_text)
