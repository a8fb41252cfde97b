"""What a job does: its steps, signals and requeues; the interpreter and Slurm are stand-ins."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from megatron_dr.launch import script, start
from megatron_dr.launch.recipe import read_recipe

from .test_recipe import FOLDER

SLURM = Path(__file__).parent / "slurm"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "a b"
    (found / "slurm").mkdir(parents=True)
    monkeypatch.setenv("PATH", f"{SLURM}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(found / "slurm"))
    return found


def job(folder: Path, slurm: bool) -> script.Job:
    given = [f"hf={folder}", f"data={folder}/d.jsonl", "flags.train-iters=40", "gpus=16",
             f"python={SLURM / 'python'}"]  # fmt: skip
    recipe = read_recipe(FOLDER, "mistral-7b/sft", given if slurm else [*given, "gpus=8"])
    return script.job(recipe, folder / "out", slurm, start.free_port())


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def when(path: Path, number: int) -> None:
    end = time.monotonic() + 60
    while len(lines(path)) < number:
        assert time.monotonic() < end, f"{path} has {lines(path)}"
        time.sleep(0.02)


def preempt(log: Path, slurm: Path, batch: int, stops: int = 1) -> None:
    """End a job that was told to, when it has stopped so often, and requeue it."""
    end = time.monotonic() + 300
    while log.read_text().count("launch: stopped at") < stops:
        assert time.monotonic() < end
        time.sleep(0.05)
    (slurm / "requeued").touch()
    os.kill(batch, signal.SIGKILL)


@pytest.mark.parametrize("number, everyone", [
    (signal.SIGUSR1, ""), (signal.SIGUSR1, "1"), (signal.SIGTERM, ""),
])  # fmt: skip
def test_a_signal_saves_and_requeues(
    folder: Path, number: int, everyone: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Sent to the job's shell, which hands it to the tasks, or to all that they have started."""
    monkeypatch.setenv("FAKE_SLURM_ALL", everyone)
    made, slurm = job(folder, True), folder / "slurm"
    job_number = start.submit(made)
    log = start.log_of(made, job_number)
    when(slurm / "starts", 1)
    time.sleep(0.3)
    batch = int((slurm / "batch").read_text())
    os.kill(batch, number)
    if number == signal.SIGTERM:  # a preemption: Slurm itself ends and requeues it
        preempt(log, slurm, batch)
    assert start.follow(log, job_number, 0.05) == 0
    said = capsys.readouterr().out
    first, second = (int(line.split()[1]) for line in lines(slurm / "starts"))
    assert first == 0 and 0 < second < 40
    assert f"launch: stopped at iteration {second} of 40: it was told to stop." in said
    assert said.endswith("launch: complete: 40 of 40 iterations.\n")
    assert (folder / "out" / "hf" / "config.json").exists()


def test_it_is_tried_again_while_it_gets_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "slurm" / "ends").write_text("saved\nsaved\nlost\n")
    made = job(folder, True)
    number = start.submit(made)
    assert start.follow(start.log_of(made, number), number, 0.05) == 1
    said = capsys.readouterr().out
    assert lines(folder / "slurm" / "starts") == ["from 0", "from 1", "from 2"]
    assert said.count("it ended with exit code 1 after a new checkpoint.") == 2
    assert "launch: failed: training ended with exit code 1, without a new checkpoint." in said


def test_here(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A signal has it saved; the same again goes on, and a third time there is nothing left."""
    made, starts = job(folder, False), folder / "slurm" / "starts"

    def stop() -> None:
        when(starts, 1)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    assert start.here(made) == 3
    stopper.join()
    assert "launch: launch it again to go on." in capfd.readouterr().out
    assert start.here(made) == 0 and start.here(made) == 0
    assert len(lines(starts)) == 2
    assert capfd.readouterr().out.count("launch: complete: 40 of 40 iterations.") == 2
