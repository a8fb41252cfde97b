"""Where a run stands: how far it is, and whether it goes on."""

import time
from datetime import UTC, datetime

from megatron_dr.report import about
from megatron_dr.report.run_log import RunLog


def sentence(run: RunLog) -> str:
    """In words."""
    of = f" of {run.steps}" if run.steps else ""
    at = f"step {run.step}{of}" if run.step else f"no step yet{of and f', {run.steps} to come'}"
    if run.has_ended:
        return f"Ended at {at}."
    changed = run.path.stat().st_mtime
    ago = duration(max(time.time() - changed, 0))
    when = datetime.fromtimestamp(changed, UTC).strftime("%Y-%m-%d %H:%M UTC")
    going = goes_on(run)
    if going is None:
        return f"At {at}, still going or stopped: its last line is of {when}, {ago} ago."
    if going:
        return f"Still going, at {at}; its last line is {ago} old{_left(run)}."
    return f"Stopped at {at}, before its end: its process is gone, its last line is of {when}."


def goes_on(run: RunLog) -> bool | None:
    """Whether a run's process is there; None where it can't be known from this machine."""
    process = run.about.get("process")
    if run.has_ended:
        return False
    if not isinstance(process, dict) or not isinstance(process.get("pid"), int):
        return None
    if any(process.get(name) != value for name, value in about.place().items()):
        return None
    began, said = about.created(process["pid"]), process.get("created")
    return began is not None and isinstance(said, float) and abs(began - said) < 1.0


def _left(run: RunLog) -> str:
    """Of its steps, by the mean of the last ones."""
    seconds = run.curve("train", "step seconds")
    if seconds is None or not run.steps or run.step >= run.steps:
        return ""
    last = seconds.values[-20:]
    return f", about {duration(sum(last) / len(last) * (run.steps - run.step))} are left"


def duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
