"""The scripts that `megatron-dr launch` writes, run as they are: here, and as a job of Slurm's."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_dr.config.yaml_file import Entry
from megatron_dr.launch.recipe import Recipe
from tests.launch.test_job import preempt

from ._launch import small
from ._train import ROOT

SLURM = ROOT / "tests" / "launch" / "slurm"
NAME, SAID = "mistral-7b/sft", "said.txt"


def words(recipe: Recipe) -> list[str]:
    """key=value of what a small recipe has."""
    out = []
    for name, entry in recipe.table.items():
        for key, inner in _leaves(name, entry):
            out.append(f"{key}={inner}")
    return out


def _leaves(name: str, entry: Entry) -> list[tuple[str, str]]:
    if isinstance(entry.value, dict):
        return [leaf for key, one in entry.value.items() for leaf in _leaves(f"{name}.{key}", one)]
    if isinstance(entry.value, list):
        return [(name, f"[{', '.join(one.text for one in entry.value)}]")]
    return [(name, entry.text)]


def started(recipe: Recipe, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    """It writes to a file: a pipe that nobody reads is full after Megatron's arguments."""
    (folder / "slurm").mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FAKE_SLURM": str(folder / "slurm"),
                   "PATH": f"{SLURM}:{os.environ['PATH']}"}  # fmt: skip
    command = [sys.executable, "-m", "megatron_dr", "launch", NAME, *words(recipe), *more]
    with open(folder / SAID, "w") as file:
        return subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT
        )


def wait_for(seen: Any, process: subprocess.Popen[bytes], seconds: float = 500) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = seen()
        if found:
            return found
        assert process.poll() is None, f"it ended with {process.returncode}"
        time.sleep(0.1)
    raise AssertionError("it did not come in time")


def ended(process: subprocess.Popen[bytes], folder: Path) -> str:
    try:
        process.wait(timeout=800)
    finally:
        if process.poll() is None:
            for each in psutil.Process(process.pid).children(recursive=True):
                each.kill()
            process.kill()
    return (folder / SAID).read_text()


def iterations(out: Path) -> list[int]:
    lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() \
        else []  # fmt: skip
    return [json.loads(line)["iteration"] for line in lines if '"kind": "train"' in line]


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_here(tmp_path: Path) -> None:
    """From Hugging Face and back; stopped by a signal, and gone on with; a value with a space."""
    folder = tmp_path / "a b $HOME 'c'"
    folder.mkdir()
    recipe = small(NAME, folder, "gpus=2", f"python={sys.executable}", "flags.train-iters=60")
    out = folder / "out"
    process = started(recipe, folder)
    wait_for(lambda: iterations(out), process)
    process.send_signal(signal.SIGTERM)
    said = ended(process, folder)
    assert process.returncode == 3, said
    last = int((out / "train" / "latest_checkpointed_iteration.txt").read_text())
    assert f"launch: stopped at iteration {last} of 60" in said and 0 < last < 60
    said = ended(process := started(recipe, folder), folder)
    assert process.returncode == 0, said
    assert "launch: complete: 60 of 60 iterations." in said
    assert iterations(out) == list(range(1, 61)) and (out / "hf" / "config.json").exists()


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_nodes_of_slurm(tmp_path: Path) -> None:
    """Two torchruns that meet on loopback. The time runs out, then the job is preempted: both times
    a checkpoint is written, the job requeued, and in the end it is complete."""
    recipe = small(NAME, tmp_path, "gpus=2", "gpus_per_node=1", f"python={sys.executable}",
                   "flags.train-iters=60")  # fmt: skip
    out, slurm = tmp_path / "out", tmp_path / "slurm"
    process = started(recipe, tmp_path, "--slurm", "--show-logs")
    wait_for(lambda: iterations(out), process)
    saved: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        batch, before = int((slurm / "batch").read_text()), len(saved)
        os.kill(batch, number)
        if number == signal.SIGTERM:
            preempt(next((out / "logs").glob("*.log")), slurm, batch, 2)
        wait_for(lambda n=before: len(codes(slurm)) > n, process)
        saved.append(int((out / "train" / "latest_checkpointed_iteration.txt").read_text()))
        wait_for(lambda n=saved[-1]: max(iterations(out)) > n, process)
    said = ended(process, tmp_path)
    assert process.returncode == 0, said
    assert 0 < saved[0] < saved[1] < 60
    for last in saved:
        assert f"launch: stopped at iteration {last} of 60: it was told to stop." in said
    assert "launch: complete: 60 of 60 iterations." in said
    assert iterations(out) == list(range(1, 61)) and codes(slurm) == ["0", "137", "0"]


def codes(slurm: Path) -> list[str]:
    return (slurm / "codes").read_text().split() if (slurm / "codes").exists() else []
