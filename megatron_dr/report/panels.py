"""Which of a run's figures are shown together, under which title and unit.

What no line of `PANELS` asks for has a panel of its own among the others, so none is left out.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_dr.report import gpus
from megatron_dr.report.run_log import Curve, RunLog

TRAIN, HELD_OUT, GPUS = "train", "validation", gpus.KIND
OTHERS = "Other figures"
_LARGE = ("bytes", "kB", "MB", "GB", "TB")


class Rule(NamedTuple):
    """Figures of one panel.

    Attributes:
        kind: of lines; of validation, those of all its sets.
        names: a pattern of whole names.
        drop: what is left out of a name in the legend, a pattern.
    """

    section: str
    title: str
    unit: str
    kind: str
    names: str
    drop: str = ""
    log: bool = False


@dataclass
class Panel:
    """Curves that are drawn together.

    Attributes:
        curves: (run's number, label, curve).
        log: positive values that may differ a hundredfold.
    """

    section: str
    title: str
    unit: str
    curves: list[tuple[int, str, Curve]]
    log: bool = False

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(label for _, label, _ in self.curves))


_LOSSES, _RULE, _COST = "Losses", "The rule", "Time, network, memory"
_OF_SET = r"target loss .+"
PANELS = (
    Rule(_LOSSES, "Loss in training", "loss", TRAIN, r".*\bloss"),
    Rule(_LOSSES, "Held-out loss", "loss", HELD_OUT, r".*\bloss"),
    Rule(_LOSSES, "Target loss in training, by set", "loss", TRAIN, _OF_SET, drop="target loss "),
    Rule(_LOSSES, "Held-out target loss, by set", "loss", HELD_OUT, _OF_SET, drop="target loss "),
    Rule(_RULE, "Cosine with the target", "cosine", TRAIN, r"dr cos .*", drop="dr cos "),
    Rule(_RULE, "Effective rows, rows of weight 0", "rows", TRAIN, r"dr (zero )?rows", drop="dr "),
    Rule(_RULE, "Distance of d from t", "lengths of t", TRAIN, r"dr residual", drop="dr "),
    Rule(_RULE, "Shares of the update", "share", TRAIN, r"dr (alpha|beta)", drop="dr "),
    Rule(_RULE, "r: t's part beside d and g", "share of unit vectors", TRAIN, r"dr r", drop="dr "),
    Rule(_RULE, "What d (D), g (G) and new t (m) gain", "lengths of t", TRAIN, r"dr [DGm]",
         drop="dr "),
    Rule(_RULE, "Wear of the target", "passes / P", TRAIN, r"dr wear", drop="dr "),
    Rule(_RULE, "E: passes of the run over the target", "passes", TRAIN, r"dr E", drop="dr "),
    Rule(_RULE, "Weights of the corpora", "weight", TRAIN, r"dr weight .*", drop="dr weight "),
    Rule(_RULE, "Weights of the target sets", "weight", TRAIN, r"dr target weight .*",
         drop="dr target weight "),
    Rule(_RULE, "How much of each corpus is read", "share", TRAIN, r"dr share .*",
         drop="dr share "),
    Rule(_RULE, "Sketch error", "share", TRAIN, r"dr sketch error", drop="dr "),
    Rule(_COST, "A step, whole", "seconds", TRAIN, r"step seconds", drop=" seconds"),
    Rule(_COST, "The plugin's own work, by phase", "ms", TRAIN, r"dr .* ms", drop="dr | ms$"),
    Rule(_COST, "A validation", "seconds", HELD_OUT, r"validation seconds", drop=" seconds"),
    Rule(_COST, "Sent beside Megatron's own reduction, a rank", "bytes a step", TRAIN, r"dr bytes",
         drop="dr "),
    Rule(_COST, "Peak memory so far, the last rank's", "bytes", TRAIN, r"peak memory bytes",
         drop=" bytes"),
    Rule(_COST, "Memory of GPUs", "GiB", GPUS, r"memory GiB \d+", drop="memory GiB "),
    Rule(_COST, "Power of GPUs", "W", GPUS, r"power W \d+", drop="power W "),
    Rule(_COST, "Time that GPUs are busy", "%", GPUS, r"busy % \d+", drop="busy % "),
    Rule(_COST, "Clock of GPUs", "MHz", GPUS, r"SM clock MHz \d+", drop="SM clock MHz "),
    Rule(OTHERS, "Learning rate", "rate", TRAIN, r"learning rate", log=True),
)  # fmt: skip


def panels(runs: Sequence[RunLog]) -> list[Panel]:
    """Of all runs together, in the order of the page."""
    taken: set[tuple[str, str]] = set()
    found = []
    for rule in PANELS:
        curves = []
        for number, run in enumerate(runs):
            for kind, name in _asked(rule, run):
                taken.add((kind, name))
                label = re.sub(rule.drop, "", _label(kind, name))
                curves.append((number, label, _curve(run, kind, name)))
        if curves:
            found.append(_panel(rule, curves))
    return found + _others(runs, taken)


def _asked(rule: Rule, run: RunLog) -> list[tuple[str, str]]:
    return [
        (kind, name) for kind in run.kinds if _is_of(kind, rule.kind) for name in run.names(kind)
        if re.fullmatch(rule.names, name) and run.curve(kind, name)
    ]  # fmt: skip


def _is_of(kind: str, wanted: str) -> bool:
    return kind == wanted or (wanted in (HELD_OUT, GPUS) and kind.startswith(f"{wanted}-"))


def _label(kind: str, name: str) -> str:
    return name if kind in (TRAIN, HELD_OUT) else f"{name}, {kind.partition('-')[2]}"


def _curve(run: RunLog, kind: str, name: str) -> Curve:
    curve = run.curve(kind, name)
    assert curve is not None
    return curve


def _panel(rule: Rule, curves: list[tuple[int, str, Curve]]) -> Panel:
    """Bytes are counted in thousands, millions, ..., as the most of them needs."""
    unit, most = rule.unit, max((abs(c.extreme(max)) for _, _, c in curves), default=0.0)
    if unit.startswith("bytes") and most >= 1000:
        power = min(int(math.log10(most) / 3), len(_LARGE) - 1)
        unit = unit.replace("bytes", _LARGE[power], 1)
        curves = [(n, label, Curve(c.steps, [v / 1000**power for v in c.values]))
                  for n, label, c in curves]  # fmt: skip
    return Panel(rule.section, rule.title, unit, curves, rule.log)


def _others(runs: Sequence[RunLog], taken: set[tuple[str, str]]) -> list[Panel]:
    """A panel for each, of training and of what is held out; a target's beside the general's."""
    found: dict[str, Panel] = {}
    for number, run in enumerate(runs):
        for kind, name in _curves(run):
            if (kind, name) in taken:
                continue
            of = name.removeprefix("target ")
            title = of if kind == TRAIN else f"{of}, held out"
            panel = found.setdefault(title, Panel(OTHERS, title, of, []))
            panel.curves.append((number, _label(kind, name), _curve(run, kind, name)))
    return list(found.values())


def _curves(run: RunLog) -> Iterable[tuple[str, str]]:
    for kind in run.kinds:
        if kind == TRAIN or _is_of(kind, HELD_OUT):
            yield from ((kind, name) for name in run.names(kind) if run.curve(kind, name))
