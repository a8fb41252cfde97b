"""How many steps and seeds fit into a time, and how many runs side by side into a machine."""

import math
import re
import statistics
from dataclasses import dataclass

from megatron_dr.compare.jobs import Job

LEAST = 20  # steps below which a run says nothing
EVALUATIONS = 4  # of a run, and Megatron's own at its end
SHARE = 0.85  # of the budget that is planned; runs side by side are slower than the one timed
SETS = ("target", "general", "target-test", "general-test")  # evaluated, by their names
_UNITS = {"": 60, "s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Measured:
    """Of a short run: seconds of its start, a step, an evaluation, and bytes of one process."""

    start: float
    step: float
    evaluation: float
    memory: int

    @classmethod
    def of(cls, job: Job) -> "Measured":
        """A run with one evaluation. Its first step is left out: it makes what others find."""
        steps = [line["step seconds"] for line in job.lines("train")]
        lines = [line for name in SETS for line in job.lines(f"validation-{name}")]
        evaluation, done = sum(line["validation seconds"] for line in lines), job.done
        start = max(done["seconds"] - sum(steps) - evaluation, 0.0)
        return cls(start, statistics.median(steps[1:]), evaluation, done["memory"])

    def run(self, steps: int) -> float:
        """Seconds of a run of so many steps."""
        return self.start + steps * self.step + (EVALUATIONS + 1) * self.evaluation


def seconds(text: str) -> float:
    """Of 90s, 30m, 2h; a number alone is in minutes.

    Raises:
        ValueError: something else, or nothing.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if found is None or not 0 < float(found[1]) < math.inf:
        raise ValueError(f"--budget {text}: give a time as 90s, 30m or 2h.")
    return float(found[1]) * _UNITS[found[2]]


def fit(
    budget: float, arms: int, seeds: int, beside: int, measured: Measured, most: int
) -> tuple[int, int]:
    """(steps, seeds): as many steps as fit, at most `most`; fewer seeds where they would be few.

    Args:
        budget: seconds for all runs.
        beside: runs at a time.

    Raises:
        ValueError: not even one seed fits.
    """
    for count in range(seeds, 0, -1):
        rounds = math.ceil(arms * count / beside)
        steps = int((budget * SHARE / rounds - measured.run(0)) / measured.step)
        if steps >= min(LEAST, most):
            return min(steps, most), count
    needed = all_of(measured, arms, beside, LEAST) / SHARE
    raise ValueError(
        f"--budget leaves {budget / 60:.1f} minutes for the arms, and {arms} arms of {LEAST} steps "
        f"take {needed / 60:.1f} with one seed: raise it, give fewer --arms, or --steps."
    )


def all_of(measured: Measured, runs: int, beside: int, steps: int) -> float:
    """Seconds of so many runs, `beside` at a time."""
    return math.ceil(runs / beside) * measured.run(steps)


def beside(runs: int, ranks: int, places: int, free: int, memory: int) -> int:
    """How many runs there is room for side by side, at least one.

    Args:
        ranks: processes of a run.
        places: CPU cores, or GPUs.
        free, memory: bytes of the machine, and of one process.
    """
    room = min(places // ranks, int(0.8 * free / (ranks * max(memory, 1))))
    return max(1, min(runs, room))
