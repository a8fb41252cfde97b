"""What Slurm says of a job that no longer writes."""

import re
import shutil
import subprocess

_OVER = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
         "PREEMPTED", "REVOKED", "TIMEOUT"}  # fmt: skip
_UNKNOWN = "Invalid job id"
_SECONDS = 60.0  # that a controller has to answer


def over(number: str) -> str:
    """How a job has ended; empty while it has not, and where the controller does not answer.

    A job that is requeued may be over for a moment.
    """
    if shutil.which("squeue"):
        state = _said("squeue", "-h", "-j", number, "-o", "%T")
        if state is None or state and state not in _OVER:
            return ""
    job = _said("scontrol", "show", "job", number)
    if job is None:
        return ""
    found = re.search(r"\bJobState=(\S+) Reason=(\S+)", job)
    if not found:
        return "Slurm knows it no longer"
    state, reason = found.groups()
    why = "" if reason == "None" else f" ({reason})"
    return f"Slurm says {state}{why}" if state in _OVER else ""


def _said(*words: str) -> str | None:
    """What a command prints, nothing of a job that Slurm does not know; None where it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return "" if _UNKNOWN in done.stderr else None
    return done.stdout.strip()
