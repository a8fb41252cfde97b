"""A log of a job of Slurm's, followed to its end or the job's; Slurm's commands are stand-ins."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from megatron_dr.launch import queue, start

from .test_job import SLURM, folder, job, when

__all__ = ["folder"]
GONE = "has ended, Slurm says NODE_FAIL (NodeDown), and its log does not say how far it came"


def test_to_its_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "17.log"
    log.write_text("launch: stopped at iteration 3 of 9: it was told to stop.\nlaunch: complete: 9")
    log.write_text(log.read_text() + "\nlater\n")
    assert start.follow(log, "17") == 0
    assert capsys.readouterr().out.count("launch: ") == 2
    log.write_text("launch: failed: training ended with exit code 1.\n")
    assert start.follow(log, "17") == 1


@pytest.mark.timeout(60)
def test_a_job_whose_node_is_lost(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, slurm = job(folder, True), folder / "slurm"
    number = start.submit(made)
    when(slurm / "starts", 1)
    assert queue.over(number) == ""
    os.kill(int((slurm / "batch").read_text()), signal.SIGKILL)
    assert start.follow(start.log_of(made, number), number, 0.05, 0.2) == 1
    assert f"launch: job {number} {GONE}" in capsys.readouterr().err


@pytest.mark.timeout(60)
def test_a_job_that_never_began(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "slurm" / "state").write_text("CANCELLED")
    assert start.follow(folder / "17.log", "17", 0.01, 0.02) == 1
    assert "launch: job 17 has ended, Slurm says CANCELLED, and" in capsys.readouterr().err


@pytest.mark.timeout(60)
def test_it_is_believed_the_second_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running again after the first, or with a line after it, it is not over."""
    log = tmp_path / "17.log"
    answers = ["", "over", "", "over", "line", "over", "", "over", "end"]

    def over(number: str) -> str:
        said = answers.pop(0)
        if answers and answers[0] in ("line", "end"):
            with log.open("a") as file:
                file.write({"line": "late\n", "end": "launch: complete: 9\n"}[answers.pop(0)])
        return said

    monkeypatch.setattr(queue, "over", over)
    assert start.follow(log, "17", 0.01, 0.02) == 0
    assert not answers and capsys.readouterr().out == "late\nlaunch: complete: 9\n"


@pytest.mark.parametrize("with_squeue", [True, False])
@pytest.mark.parametrize("state, says", [
    ("PENDING", ""), ("RUNNING", ""), ("COMPLETING", ""), ("UNREACHED", ""),
    ("CANCELLED", "Slurm says CANCELLED"), ("NODE_FAIL", "Slurm says NODE_FAIL (NodeDown)"),
    ("", "Slurm knows it no longer"),
])  # fmt: skip
def test_what_slurm_says(
    state: str, says: str, with_squeue: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "slurm" / "state").write_text(state)
    if not with_squeue:
        shutil.copy(SLURM / "scontrol", folder)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    assert bool(shutil.which("squeue")) == with_squeue
    assert queue.over("17") == says


def test_no_slurm_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert queue.over("17") == ""
