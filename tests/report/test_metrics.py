"""Metrics: what is written is read, also after a crash."""

import json
import math
import resource
import signal
from pathlib import Path

import pytest
import torch

from megatron_dr.report import metrics


def test_written_is_read_by_kind_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"  # the folder is made
    file = metrics.MetricsFile(str(path))
    file.write("train", 1, {"loss": torch.tensor([2.5]), "rate": 1})
    file.write("validation", 1, {"loss": 3.0})
    file.write("train", 2, {"loss": torch.tensor(0.1), "rate": None})
    assert metrics.read(path, "train") == [
        {"kind": "train", "iteration": 1, "loss": 2.5, "rate": 1.0},
        {"kind": "train", "iteration": 2, "loss": float(torch.tensor(0.1))},
    ]
    assert metrics.read(str(path), "validation") == [
        {"kind": "validation", "iteration": 1, "loss": 3.0}
    ]


def test_each_line_is_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = metrics.MetricsFile(str(path))
    for iteration in (1, 2, 3):
        file.write("train", iteration, {})
        assert len(path.read_text().splitlines()) == iteration
        assert json.loads(path.read_text().splitlines()[-1])["iteration"] == iteration


def test_resumed_run_appends(tmp_path: Path) -> None:
    path = str(tmp_path / "metrics.jsonl")
    for iteration in (1, 2):
        metrics.MetricsFile(path).write("train", iteration, {})
    assert [line["iteration"] for line in metrics.read(path, "train")] == [1, 2]


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    path = str(tmp_path / "metrics.jsonl")
    metrics.MetricsFile(path).write("train", 1, {"loss": math.nan, "norm": math.inf})
    (line,) = metrics.read(path, "train")
    assert math.isnan(line["loss"]) and line["norm"] == math.inf


def cut_short(path: Path) -> None:
    """Two lines, the second without its end."""
    file = metrics.MetricsFile(str(path))
    file.write("train", 1, {"loss": 1.0})
    file.write("train", 2, {"loss": 2.0})
    path.write_bytes(path.read_bytes()[:-8])


def test_line_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    cut_short(path)
    assert [line["iteration"] for line in metrics.read(path, "train")] == [1]


def test_resumed_after_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    cut_short(path)
    metrics.MetricsFile(str(path)).write("train", 2, {"loss": 2.0})
    assert [line["iteration"] for line in metrics.read(path, "train")] == [1, 2]


def test_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (str(tmp_path), str(tmp_path / "file" / "metrics.jsonl")):
        with pytest.raises(ValueError, match=f"^{path}: can't be written"):
            metrics.MetricsFile(path)


def test_a_full_disk_is_said_once_and_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    file = metrics.MetricsFile("/dev/full")
    for iteration in (1, 2, 3):
        file.write("train", iteration, {"loss": 1.0})
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("megatron_dr: note: /dev/full: can't be written (No space left")


@pytest.mark.parametrize("room", [0, 5])
def test_lines_follow_where_there_is_room_again(tmp_path: Path, room: int) -> None:
    """A limit on the file's size stands for a disk: of a line that does not fit nothing stays."""
    path = tmp_path / "metrics.jsonl"
    file = metrics.MetricsFile(str(path))
    file.write("train", 1, {"loss": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, hard))
        file.write("train", 2, {"loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    file.write("train", 3, {"loss": 3.0})
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 3]
