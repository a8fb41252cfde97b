"""A run in the terminal."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_dr.cli import watch
from megatron_dr.report import about
from megatron_dr.report.follow import Follower
from megatron_dr.report.metrics import MetricsFile

from ._runs import train, write


def test_one_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "metrics.jsonl", **{"a[b]c": float("nan")})
    assert watch.main([str(path), "--once"]) == 0
    out = capsys.readouterr().out
    assert "Ended at step 6 of 6" in out and "\x1b" not in out
    rows = {line[:24].strip(): line.split() for line in out.splitlines()}
    assert rows["target loss"][2:4] == ["4", "0.6667"] and rows["target loss"][4] == "█▄▂▂▁▁"
    assert rows["a[b]c"][1:] == ["nan", "nan", "××××××"]
    assert "lm loss, held out" in out


def test_a_frame_fits_a_narrow_terminal(tmp_path: Path) -> None:
    follower = Follower(write(tmp_path / "metrics.jsonl"))
    follower.read()
    console = Console(width=60, file=io.StringIO(), force_terminal=True)
    console.print(watch.frame(follower.run, 60))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "lm loss, held out" in text and "…" not in text


class Goes:
    """A run of this process that takes a step at each look, and ends or stops at the sixth."""

    def __init__(self, path: Path, ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file, self.step, self.ends = MetricsFile(str(path)), 0, ends
        here = about.process()
        self.file.begin(0, {"steps": 6, "process": here})
        monkeypatch.setattr(watch.time, "sleep", self.sleep)
        self.monkeypatch = monkeypatch

    def sleep(self, seconds: float) -> None:
        self.step += 1
        if self.step <= 6:
            self.file.write("train", self.step, train(self.step))
        elif self.ends:
            self.file.write("validation", 6, {"lm loss": 1.25})
            self.file.write("end", 6, {})
        else:
            self.monkeypatch.setattr(about, "created", lambda pid: None)


@pytest.mark.parametrize("ends", [True, False])
def test_lines_until_the_run_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    path = tmp_path / "metrics.jsonl"
    Goes(path, ends, monkeypatch)
    assert watch.main([str(path)]) == int(not ends)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("step 1/6 | lm loss 2.9 | target loss 4 | dr cos update 0.1 |")
    if ends:
        assert said[6:] == ["step 6/6 | validation | lm loss 1.25", "Ended at step 6 of 6."]
    else:
        assert len(said) == 7 and said[6].startswith("Stopped at step 6 of 6, before its end")


def test_a_live_table_until_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    Goes(path, True, monkeypatch)
    console = Console(file=io.StringIO(), force_terminal=True, width=90, height=40)
    assert watch.watch(Follower(path), console) == 0
    assert isinstance(console.file, io.StringIO)
    last = console.file.getvalue().rpartition("Ended at step 6 of 6")[2]
    assert "lm loss, held out" in last and "█" in last


def stopped(*_: Any) -> None:
    raise KeyboardInterrupt


def test_it_ends_with_ctrl_c_and_with_what_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert watch.main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("watch: error: ")
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    assert watch.main([str(tmp_path / "text.jsonl")]) == 2
    monkeypatch.setattr(watch.time, "sleep", stopped)
    assert watch.main([str(write(tmp_path / "metrics.jsonl", ends=False))]) == 130
