"""Task metrics of the runs: of greedy answers, by the weights of a run's end."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dr.compare import figures
from megatron_dr.compare.jobs import Job
from megatron_dr.compare.splits import contents
from megatron_dr.data import records
from megatron_dr.data.file_samples import read
from megatron_dr.report import answers
from megatron_dr.rl.prompts import question


@dataclass(frozen=True)
class Metrics:
    """What every run's answers are scored by, and the samples that ask for them.

    Raises:
        ValueError: a sample that asks for no answer, or none at all.
    """

    names: tuple[str, ...]
    samples: Path
    called: str  # the samples

    def __post_init__(self) -> None:
        number = 0
        for where, record in read(str(self.samples)):
            number += 1
            try:
                with records.at(where):
                    question(record)
            except ValueError as error:
                raise ValueError(f"--metrics asks for answers to {self.called}: {error}") from None
        if not number:
            raise ValueError(f"{self.samples}: the file has no samples.")

    @property
    def flags(self) -> tuple[str, ...]:
        """Of every run."""
        names = ",".join(self.names)
        return "--dr-generate", str(self.samples), "--dr-generate-metrics", names


def metrics(names: str | None, given: str | None, test: Path) -> Metrics | None:
    """Of --metrics and --metrics-target; None where they are not asked for.

    Args:
        test: the target's test records, in place of a file that is not given.

    Raises:
        ValueError: a folder, a reward that can't be loaded, or as `answers.parse` and `Metrics`.
    """
    if names is None:
        return None
    parsed = answers.parse("--metrics", names)
    answers.check_rewards(parsed)
    if given is None:
        return Metrics(parsed, test, "the target's test records")
    if Path(given).is_dir():  # a finished run is known by the content of the files it is given
        raise ValueError(f"--metrics-target {given}: give one file of samples, not a folder.")
    return Metrics(parsed, Path(given).resolve(), given)


def overlap(found: Metrics, train: Path) -> str:
    """A sentence where samples that are asked about are trained on, too; else empty."""
    asked, known = contents(str(found.samples)), set(contents(str(train)))
    same = sum(content in known for content in asked)
    return (
        f"note: {same} of {len(asked)} samples of {found.called} are among the target's training "
        "records, so that metrics are better than they would be of new ones"
    ) * bool(same)


def values(job: Job) -> Mapping[str, Any]:
    """Of a run; empty where none were written."""
    lines = job.lines("generation")
    return lines[-1] if lines else {}


def failure(job: Job, names: Sequence[str]) -> str | None:
    """Why a run's metrics can't be compared."""
    found = values(job)
    if names and not found:
        return f"no answers were generated ({job.folder})"
    name = next((name for name in names if not math.isfinite(found[name])), None)
    return None if name is None else f"{name} could score no answer ({job.folder})"


def summary(jobs: Sequence[Job], names: Sequence[str]) -> dict[str, Any]:
    """Of an arm's runs, as results.json has it: each metric that is a number, over the seeds, how
    many of all answers it could not score, and the share of answers that their length cut."""
    found = [values(job) for job in jobs]
    if not names:
        return {}
    of_names = {
        name: {**figures.summary([one[name] for one in found]),
               "failed": int(sum(one.get(f"failed {name}", 0) for one in found))}
        for name in names if all(math.isfinite(one[name]) for one in found)
    }  # fmt: skip
    return {**of_names, "truncated": statistics.mean(one["truncated"] for one in found)}


def unscored(found: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """A sentence for each arm and metric that left answers out."""
    return [
        f"{arm}: {own['metrics'][name]['failed']} answers could not be scored by {name} and are "
        "left out of its mean."
        for arm, own in found.items() for name in names if own["metrics"][name]["failed"]
    ]  # fmt: skip
