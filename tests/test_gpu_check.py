"""`megatron-dr gpu-check`: its parts stand alone, and nothing that was found is lost."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dr.cli import doctor, gpu_check
from megatron_dr.cli.gpu_report import Report
from megatron_dr.mcore.gpu_check.found import Found, Where, within

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def good(where: Where) -> Iterator[Found]:
    yield Found("one", "ok", {"error": 0.5})
    yield Found("one", "measured", {"error": 0.25})  # in place of the one before
    yield Found("two", "skipped: no CUDA device")


def broken(where: Where) -> Iterator[Found]:
    yield Found("before", "ok")
    raise RuntimeError("CUDA error: an illegal memory access")


def slow(where: Where) -> Iterator[Found]:
    yield Found("before", "ok")
    time.sleep(30)


def off(where: Where) -> Iterator[Found]:
    yield within("too far", 2.0, 1.0)
    yield within("no number", float("nan"), 1.0)


def none(where: Where) -> Iterator[Found]:
    yield Found("one", "skipped: no CUDA device")


STAND_INS = {"good": good, "broken": broken, "slow": slow, "off": off, "none": none}


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {name: gpu_check.Part(name, 0.3 if name == "slow" else 20, name) for name in STAND_INS}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(gpu_check, "_findings", lambda name, where: STAND_INS[name](where))


def check(out: Path, *parts: str) -> tuple[int, dict[str, Any]]:
    code = gpu_check.main(["--out", str(out), "--parts", ",".join(parts)])
    return code, json.loads((out / "report.json").read_text())["parts"]


def test_each_part_stands_alone(
    stand_ins: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, parts = check(tmp_path, *STAND_INS)
    assert code == 1
    states = {name: part["state"] for name, part in parts.items()}
    assert states == {
        "good": "ok", "broken": "FAILED", "slow": "FAILED", "off": "FAILED",
        "none": "skipped: no CUDA device",
    }  # fmt: skip
    assert [line["figures"] for line in parts["good"]["found"]] == [{"error": 0.25}, {}]
    assert parts["broken"]["error"] == "RuntimeError: CUDA error: an illegal memory access"
    assert "in broken" in parts["broken"]["traceback"]
    assert parts["slow"]["error"] == "Late: not done in 0 s" and parts["slow"]["seconds"] < 5
    assert [part["found"][0]["name"] for part in (parts["broken"], parts["slow"])] == 2 * ["before"]
    assert [line["state"] for line in parts["off"]["found"]] == ["FAILED", "FAILED"]
    said = capsys.readouterr().out
    assert "illegal memory access" in said and "skipped: no CUDA device" in said


def test_all_well(stand_ins: None, tmp_path: Path) -> None:
    assert check(tmp_path, "good", "none")[0] == 0


def test_no_time_is_left(stand_ins: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "SECONDS", -1.0)
    code, parts = check(tmp_path, "good")
    assert code == 1 and "over before it" in parts["good"]["error"]


def test_a_device_that_no_longer_answers(
    stand_ins: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(gpu_check, "_answers", lambda device: False)
    code, parts = check(tmp_path, "good", "off", "none")
    assert code == 1 and list(parts) == ["good"]
    assert "stopped answering in good: run the rest by --parts off,none" in " ".join(
        capsys.readouterr().out.split()
    )


KILLED = """
import os, signal, sys, time
from megatron_dr.cli import gpu_check
from megatron_dr.mcore.gpu_check.found import Found
def part(name, where):
    yield Found("before", "ok", {{"error": 1.0}})
    {how}
gpu_check.PARTS = {{"one": gpu_check.Part("", 0.2, "")}}
gpu_check._GRACE, gpu_check._findings = 0.2, part
gpu_check.main(["--out", sys.argv[1], "--parts", "one"])
"""
HOW = {
    "killed": ("os.kill(os.getpid(), 9)", -9),
    # in a call that waits for a device no handler of Python's runs
    "held": ("signal.signal(signal.SIGALRM, signal.SIG_IGN); time.sleep(60)", 1),
}


@pytest.mark.parametrize("how", HOW)
def test_what_was_found_is_written(tmp_path: Path, how: str) -> None:
    """Also where the process is killed, or the device holds it beyond its time."""
    words, code = HOW[how]
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(how=words), str(tmp_path)], timeout=200, cwd=ROOT,
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["parts"]["one"]["state"] == "running"
    assert content["parts"]["one"]["found"][0]["figures"] == {"error": 1.0}
    assert ("ended" in content) == (how == "held")


def test_a_part_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["--parts", "maths,no_such"])
    assert "--parts no_such: there is no such part" in capsys.readouterr().err


def test_without_rich(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    report = Report(tmp_path, CPU)
    report.begin("maths")
    report.add("maths", Found("sum [1]", "ok", {"error": 1.23456e-7, "rows": 4}, "as it should"))
    report.end("maths", 1.0)
    report.show()
    said = " ".join(capsys.readouterr().out.split())
    assert "sum [1] ok error 1.23e-07, rows 4; as it should" in said
    assert said == " ".join((tmp_path / "report.txt").read_text().split())


def test_the_doctor_is_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [doctor.Finding("torch", "ok", "2"), doctor.Finding("apex", "absent", "not there")]
    monkeypatch.setattr(doctor, "examine_all", lambda: findings)
    code, parts = check(tmp_path, "doctor")
    assert code == 0 and parts["doctor"]["state"] == "ok"
    assert [line["state"] for line in parts["doctor"]["found"]] == ["ok", "absent"]
    findings.append(doctor.Finding("psutil", "MISSING", "not installed", "pip install psutil"))
    code, parts = check(tmp_path, "doctor")  # the check itself needs none
    assert code == 0 and parts["doctor"]["found"][-1]["state"] == "absent"
    assert "a run needs it: pip install psutil" in str(parts["doctor"]["found"][-1])
    findings.append(doctor.Finding("numpy", "BROKEN", "it crashes"))
    code, parts = check(tmp_path, "doctor")
    assert code == 1 and parts["doctor"]["found"][-1]["state"] == "FAILED"
