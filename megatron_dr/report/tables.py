"""A run's figures and what it was, as tables of text."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from megatron_dr.report.panels import Panel
from megatron_dr.report.run_log import RunLog, is_loss

_CURVES = ("train", "validation", "run", "blocks", "end")


class Table(NamedTuple):
    """Rows of text below a head; the first columns, so many, are words."""

    head: list[str]
    rows: list[list[str]]
    words: int


def number(value: float) -> str:
    """With four digits; what is no number as it is."""
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3e}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def of_panel(panel: Panel, runs: Sequence[str]) -> Table:
    """First, last, least and most of each curve."""
    rows = [
        [*_run(runs, runs[n]), label, number(c.values[0]), number(c.last),
         number(c.extreme(min)), number(c.extreme(max)), str(len(c.values))]
        for n, label, c in panel.curves
    ]  # fmt: skip
    head = ["figure", "first", "last", "least", "most", "values"]
    return Table([*_run(runs), *head], rows, len(_run(runs)) + 1)


def losses(runs: Sequence[RunLog]) -> Table:
    """Held-out losses, or what else a validation says, and training's own."""
    rows: dict[str, list[list[str]]] = {}
    for run in runs:
        for kind, name in _judged(run):
            curve = run.curve(kind, name)
            if curve is None:
                continue
            best = curve.extreme(min if is_loss(name) else max)
            at = [s for s, v in zip(curve.steps, curve.values, strict=True) if v == best]
            what = f"{name}, {'in training' if kind == 'train' else set_of(kind)}"
            shown = map(number, (curve.values[0], curve.last, best))
            row = [what, *_run(runs, run.name), *shown, str(at[0]) if at else ""]
            rows.setdefault(what, []).append(row)
    head = ["figure", *_run(runs), "first", "last", "best", "at step"]
    return Table(head, [row for of in rows.values() for row in of], len(_run(runs)) + 1)


def _judged(run: RunLog) -> list[tuple[str, str]]:
    return [
        (kind, name) for kind in run.kinds if kind == "train" or kind.startswith("validation")
        for name in run.names(kind) if _says_how_good(kind, name)
    ]  # fmt: skip


def _says_how_good(kind: str, name: str) -> bool:
    return is_loss(name) or (kind != "train" and name != "validation seconds")


def set_of(kind: str) -> str:
    """A validation set in words."""
    return f"held out{kind.removeprefix('validation').replace('-', ', ', 1)}"


def results(runs: Sequence[RunLog]) -> Table:
    """Test sets, answers and the best checkpoint: what comes once, and is no curve."""
    rows = [
        [*_run(runs, run.name), kind, name, str(line["iteration"]), number(float(line[name]))]
        for run in runs for kind, of_kind in run.kinds.items()
        if kind not in _CURVES and not kind.startswith("validation-")
        for line in of_kind[-1:] for name in run.names(kind)
        if isinstance(line.get(name), (int, float))
    ]  # fmt: skip
    return Table([*_run(runs), "of", "figure", "step", "value"], rows, len(_run(runs)) + 2)


def _run(runs: Sequence[Any], said: str = "run") -> list[str]:
    """A first column, where there are several."""
    return [said] if len(runs) > 1 else []


def about(run: RunLog) -> list[tuple[str, str]]:
    """What a run was, without its flags: [(what, said)]."""
    known = run.about
    git, machine = known.get("git"), known.get("machine") or {}
    found = {
        "metrics": str(run.path),
        "program": known.get("program"),
        "started": known.get("started"),
        "folder": known.get("folder"),
        "commit": git and f"{git.get('commit')}{', with changes' * bool(git.get('changed'))}",
        "versions": _listed(known.get("versions")),
        "device": known.get("device") and f"{known.get('ranks')} x {known['device']}",
        "layout": _listed(known.get("layout")),
        "node": ", ".join(str(machine[n]) for n in ("processor", "system") if machine.get(n)),
        "cores, memory": machine and f"{machine.get('cores')}, {_gigabytes(machine)}",
        "projection": _listed(known.get("projection")),
    }
    return [(name, str(value)) for name, value in found.items() if value]


def _gigabytes(machine: dict[str, Any]) -> str:
    size = machine.get("memory bytes")
    return f"{size / 1e9 if isinstance(size, (int, float)) else math.nan:.1f} GB"


def _listed(values: Any) -> str:
    return ", ".join(f"{n} {v}" for n, v in values.items()) if isinstance(values, dict) else ""


def flags(run: RunLog) -> list[tuple[str, str]]:
    """(flag, values), as they were given."""
    given: Iterable[Any] = run.about.get("flags") or ()
    return [(str(one[0]), str(one[1])) for one in given if isinstance(one, list) and len(one) == 2]
