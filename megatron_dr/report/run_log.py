"""A run as its metrics tell it, finished or still going."""

import bisect
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dr.report import gpus, metrics

NAME = "metrics.jsonl"
_OTHER = ("run", "blocks", "end")  # kinds whose lines are not numbers by name
_FORM = {  # of what the line `run` says; another form says nothing
    "steps": int, "blocks": list, "flags": list, "record": str, "process": dict, "git": dict,
    "machine": dict,
}  # fmt: skip
Line = dict[str, Any]


def is_loss(name: str) -> bool:
    """Whether less of a figure is better: losses, those of one of several target sets too."""
    return re.search(r"loss$|^target .*\bloss [\w-]+$", name) is not None


@dataclass(frozen=True)
class Curve:
    """Steps, rising, and a value at each; NaN and infinite values are among them."""

    steps: list[int]
    values: list[float]

    @property
    def last(self) -> float:
        return self.values[-1]

    @property
    def not_finite(self) -> list[int]:
        """Steps at which the value is no number."""
        return [step for step, value in zip(self.steps, self.values, strict=True)
                if not math.isfinite(value)]  # fmt: skip

    def thinned(self, most: int) -> tuple["Curve", int]:
        """At most so many points, and of how many values each is the mean; with NaN it is NaN."""
        size = math.ceil(len(self.steps) / most)
        if size == 1:
            return self, 1
        steps, values = (
            [math.fsum(part) / len(part) if all(map(math.isfinite, part)) else math.nan
             for part in itertools.batched(of, size)]
            for of in (self.steps, self.values)
        )  # fmt: skip
        return Curve([round(step) for step in steps], values), size

    def extreme(self, of: Callable[..., float]) -> float:
        """The least or the most of the finite values; NaN without any."""
        return of([v for v in self.values if math.isfinite(v)], default=math.nan)


@dataclass
class RunLog:
    """A run's lines by kind, each kind's in the order of their iterations.

    Where a run went on from a checkpoint, what it did after that one before is not in it.

    Attributes:
        about: what the run is (`about.of`); empty where its metrics do not say.
        has_ended: whether it ended as it should.
        blocks: names of the blocks that `kinds['blocks']` has lists for.
    """

    name: str
    path: Path
    about: dict[str, Any] = field(default_factory=dict)
    kinds: dict[str, list[Line]] = field(default_factory=dict)
    has_ended: bool = False
    blocks: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Of the last line of training; 0 before the first."""
        trained = self.kinds.get("train")
        return trained[-1]["iteration"] if trained else 0

    @property
    def steps(self) -> int | None:
        """How many the run will have; None where its metrics do not say."""
        return self.about.get("steps")

    def names(self, kind: str) -> list[str]:
        """Of the kind's numbers, in the order in which they came."""
        found = {name: None for line in self.kinds.get(kind, ()) for name in line}
        return [name for name in found if name not in ("kind", "iteration")]

    def curve(self, kind: str, name: str) -> Curve | None:
        """None where no line has a number of that name."""
        points = [
            (line["iteration"], line[name]) for line in self.kinds.get(kind, ())
            if isinstance(line.get(name), (int, float))
        ]  # fmt: skip
        if not points:
            return None
        return Curve([step for step, _ in points], [float(value) for _, value in points])

    def of_blocks(self, name: str) -> tuple[list[int], list[list[float]]]:
        """Steps, and at each a value for each of `blocks`."""
        found = [
            (line["iteration"], line[name]) for line in self.kinds.get("blocks", ())
            if isinstance(line.get(name), list) and len(line[name]) == len(self.blocks)
            and all(isinstance(value, (int, float)) for value in line[name])
        ]  # fmt: skip
        return [step for step, _ in found], [values for _, values in found]

    def add(self, line: Line) -> None:
        """The log's next line."""
        kind, step = line["kind"], line.get("iteration")
        if not isinstance(step, int):
            return
        self.has_ended = kind == "end"
        if kind == "run":
            self._begin(line.get("run"), step)
        elif kind != "end":
            of_kind = self.kinds.get(kind)
            if of_kind and step < of_kind[-1]["iteration"] and kind == "train":
                self._cut(step - 1)  # of a log that does not say where a run goes on
            self.put(kind, line)

    def put(self, kind: str, line: Line) -> None:
        """A line in place of those from its iteration on."""
        of_kind, step = self.kinds.setdefault(kind, []), line["iteration"]
        if of_kind and step <= of_kind[-1]["iteration"]:
            del of_kind[bisect.bisect_left(of_kind, step, key=_iteration) :]
        of_kind.append(line)

    def _begin(self, run: Any, step: int) -> None:
        self._cut(step)
        said = run.items() if isinstance(run, dict) else ()
        self.about = {name: v for name, v in said if isinstance(v, _FORM.get(name, object))}
        blocks = self.about.get("blocks") or []
        if blocks != self.blocks:
            self.kinds.pop("blocks", None)
        self.blocks = [str(name) for name in blocks]

    def _cut(self, step: int) -> None:
        """Take off what came after this step."""
        for of_kind in self.kinds.values():
            del of_kind[bisect.bisect_right(of_kind, step, key=_iteration) :]


def _iteration(line: Line) -> int:
    step: int = line["iteration"]
    return step


def find(run: Path) -> Path:
    """The metrics of a run: the file itself, or the one in a run's folder.

    Raises:
        ValueError: there is none, or it can't be said which.
    """
    if run.is_file():
        return run
    if not run.is_dir():
        raise ValueError(f"{run}: no such run: name its folder or the file of its --dr-metrics.")
    if (run / NAME).is_file():
        return run / NAME
    found = [path for path in sorted(run.glob("*.jsonl"))
             if not gpus.is_one(path) and next(metrics.lines(path), None)]  # fmt: skip
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(
            f"{run}: no {NAME} is in this folder, and other metrics there: {names}: name the file "
            "of the run's --dr-metrics."
        )
    return found[0]


def read(run: Path) -> RunLog:
    """A run by its folder or file.

    Raises:
        ValueError: no metrics are there.
    """
    path = find(run)
    found = RunLog(name_of(path), path)
    try:
        for line in metrics.lines(path):
            found.add(line)
        for node, beside in gpus.paths_beside(path).items():
            for line in metrics.lines(beside):
                found.put(f"{gpus.KIND}-{node}", line)
        is_empty = not path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror}).") from None
    if not (found.kinds or found.about or is_empty):
        raise ValueError(
            f"{path}: no metrics of a run: name a file that --dr-metrics wrote, or its folder."
        )
    return found


def read_all(runs: Sequence[Path]) -> list[RunLog]:
    """Several, with names that tell them apart.

    Raises:
        ValueError: as `read`, or the same run twice.
    """
    found = [read(run) for run in runs]
    paths = [one.path.resolve() for one in found]
    for number, (one, path) in enumerate(zip(found, paths, strict=True)):
        if path in paths[:number]:
            raise ValueError(f"{one.path}: the same run twice: name each once.")
    for one, name in zip(found, list(_told_apart(paths)), strict=True):
        one.name = name
    return found


def name_of(path: Path) -> str:
    """How a run is called: as its folder, or as a file that is called otherwise than usual."""
    return path.resolve().parent.name if path.name == NAME else path.stem


def _told_apart(paths: Sequence[Path]) -> Iterator[str]:
    names = [name_of(path) for path in paths]
    for name, path in zip(names, paths, strict=True):
        above = path.parent.parent if path.name == NAME else path.parent
        yield name if names.count(name) == 1 else f"{above.name}/{name}"
