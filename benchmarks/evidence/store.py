"""The results that are kept: a row of a CSV file for each run, so that seeds can be added later."""

import csv
import dataclasses
import math
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from case_runs import Run

from megatron_dr.version import VERSION

BEFORE = "before"  # the family of what the arms begin from


@dataclass(frozen=True)
class Row:
    """Losses in nats per byte at a run's end.

    Attributes:
        drawn: digest of the case's data.
        began: digest of what made its start, by flags and content.
    """

    case: str
    family: str
    dial: str
    seed: int
    target_valid: float
    target_test: float
    general_valid: float
    general_test: float
    seconds: float
    drawn: str
    began: str
    python: str
    version: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.case, self.family, self.dial, self.seed


def row(run: Run, base: str) -> Row:
    """Of a finished run."""
    last = {kind: run.job.lines(kind)[-1] for kind in ("validation", "test", "target test")}
    arm = run.arm
    return Row(
        run.case.name, arm.family if arm else BEFORE, arm.dial if arm else "", run.seed,
        last["validation"]["target loss"], last["target test"]["target test loss"],
        last["validation"]["lm loss"], last["test"]["lm loss"],
        run.job.done["seconds"], run.data.digest, base, platform.python_version(), VERSION,
    )  # fmt: skip


def add(path: Path, rows: Iterable[Row]) -> None:
    """Keep rows, in place of older ones of the same arm and seed."""
    kept = {found.key: found for found in (*_all(path), *rows)}
    if not kept:
        return
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(field.name for field in dataclasses.fields(Row))
        for found in sorted(kept.values(), key=lambda found: found.key):
            values = dataclasses.astuple(found)
            out.writerow(f"{v:.5f}" if isinstance(v, float) else v for v in values)
    partial.replace(path)


def read(path: Path) -> list[Row]:
    """What is kept, where it goes together; nothing where there is no file.

    Raises:
        ValueError: a loss that is no number; runs of one case and seed with other data or starts.
    """
    rows = _all(path)
    made: dict[tuple[str, int], tuple[str, str]] = {}
    for found in rows:
        where = f"{path}: {found.case}, {found.family} {found.dial}, seed {found.seed}"
        if not all(map(math.isfinite, (found.target_valid, found.target_test, found.general_test))):
            raise ValueError(f"{where}: a loss is no number: run it again.")
        of = found.drawn, found.began
        if made.setdefault((found.case, found.seed), of) != of:
            raise ValueError(
                f"{where}: its data or base model are others than those of the case's other arms, "
                "and can't be compared with them: run all arms of that seed again."
            )
    return rows


def _all(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [_typed(line) for line in csv.DictReader(file)]


def _typed(line: dict[str, str]) -> Row:
    kinds = {field.name: field.type for field in dataclasses.fields(Row)}
    return Row(**{name: kinds[name](value) for name, value in line.items()})  # type: ignore
