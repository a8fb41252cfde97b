"""The command itself: a tiny comparison through Megatron's loop, and the same command again."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import psutil
import pytest
from rich.console import Console

from megatron_dr.cli import compare
from megatron_dr.cli.compare import main
from megatron_dr.compare import launch
from megatron_dr.compare.arms import parse
from megatron_dr.compare.jobs import Job, job
from megatron_dr.compare.jobs import write as write_jobs
from megatron_dr.mcore.loop import runs

from ..mcore._train import cone, data, flags
from .test_arms import plan

__all__ = ["data"]  # a fixture

ROOT = Path(__file__).parents[2]
TINY = """--num-layers 1 --hidden-size 16 --num-attention-heads 2 --ffn-hidden-size 16
    --seq-length 16 --global-batch-size 2"""
BAD = "tests.compare._sets:Nowhere"


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def write_asked(path: Path, answer: str) -> None:
    """Sixteen samples that ask for an answer."""
    lines = [{"prompt": "el", "response": f"{n} {answer}"} for n in range(16)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def under(out: Path) -> list[str]:
    """Command lines of the processes that have to do with a folder."""
    lines = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
    return [line for line in lines if str(out) in line]


def end_us(after: Path) -> None:
    """SIGTERM, once a file is there."""
    while not after.exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A comparison's flags, but for its arms, for one run at a time."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    target = write(tmp_path / "t.jsonl", [f"el {n}" for n in range(16)])
    general = write(tmp_path / "g.jsonl", [f"the {n}" for n in range(24)])
    return ["--target", target, "--general", general, "--seeds", "1", "--steps", "4",
            "--base-steps", "2", "--dr-target-batch-size", "2", "--dr-device", "cpu",
            "--out", str(tmp_path / "out"), *TINY.split()]  # fmt: skip


def test_a_comparison(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """An arm whose weights become NaN fails, and the others are compared. Then it alone is left to
    do, and the results are the same. Answers to the target's test are scored, too."""
    write_asked(tmp_path / "t.jsonl", "n")
    argv = [*given, "--arms", f"cone,{BAD},mix:0.1", "--metrics", "exact,f1"]
    assert main(argv) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert "target: 16 records, 8 to train on, 4 for validation, 4 for the test" in said
    assert "3 arms x 1 seed(s), 4 steps each, after a base model's 2, 1 run(s) at a time" in said
    assert f"{BAD} failed: seed 1: " in said and "Unexpected result nan" in said
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["compared with"] == "mix:0.1" and "One seed" in found["advice"]
    assert all(0 < found["before"][name] < 10 for name in found["before"])
    values = {name: own["target test"]["values"] for name, own in found["arms"].items()}
    assert values.keys() == {"mix:0.1", "cone"} and found["failed"].keys() == {BAD}
    assert all(0 < loss < 10 for losses in values.values() for loss in losses)
    for of_run in (found["before, metrics"], *(own["metrics"] for own in found["arms"].values())):
        assert of_run.keys() == {"exact", "f1", "truncated"} and 0 <= of_run["f1"]["mean"] <= 1
    answers = tmp_path / "out" / "cone-seed-1" / "metrics.generated.jsonl"
    assert len(answers.read_text().splitlines()) == 4
    table = (tmp_path / "out" / "table.md").read_text()
    assert "exact, f1 of answers by the weights at the run's end" in table

    def never(jobs: list[Job], *_: object) -> None:
        assert [job.arm for job in jobs] == [BAD], "a finished run is run again"

    monkeypatch.setattr(launch, "train", never)
    assert main(argv) == 0
    assert "3 of 4 runs are finished; 1 to do" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    write_asked(tmp_path / "t.jsonl", "m")  # other data
    with pytest.raises(AssertionError, match="run again"):
        main(argv)
    assert "0 of 1 runs are finished; 1 to do, 1 of them anew" in capsys.readouterr().out


def test_a_signal_ends_what_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once; afterwards signals mean what they did before. One that is ignored stays so."""
    command = [sys.executable, "-c", f"open('{tmp_path}/here', 'w'); import time; time.sleep(99)"]
    workers = []

    def start(*_: object) -> launch.Process:
        workers.append(subprocess.Popen(command))
        return workers[-1]

    monkeypatch.setattr(launch, "_start", start)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    Thread(target=end_us, args=(tmp_path / "here",), daemon=True).start()
    try:
        with pytest.raises(launch.Stopped) as stopped:
            launch.train([job("a", 1, 1, tmp_path / "a", "")], tmp_path, Console(quiet=True))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert [worker.returncode for worker in workers] == [-signal.SIGTERM]


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["base/metrics.jsonl", "mix-0.1-seed-1/taken"])
def test_a_signal_ends_ranks_and_runs_and_the_same_command_goes_on(
    given: list[str], stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, argv = tmp_path / "out", [*given, "--arms", "mix:0.1,cone"]
    Thread(target=end_us, args=(out / stage,), daemon=True).start()
    assert main(argv) == 143 and not under(out)
    assert capsys.readouterr().err == "compare: stopped; the same command goes on from here.\n"
    assert main(argv) == 0
    finished = stage.startswith("mix")
    assert ("1 of 3 runs are finished; 2 to do" in capsys.readouterr().out) == finished
    assert not json.loads((out / "results.json").read_text())["failed"]


@pytest.mark.soak
def test_of_several_ranks_the_others_go_on_too(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks of a run that failed on one of them wait for one another no longer."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nan = " ".join(flags(data, f"{cone(data)} --dr-set {BAD}", 3))
    good = " ".join(flags(data, cone(data), 3))
    jobs = [job("nan", 1, 3, tmp_path / "nan", nan), job("good", 1, 3, tmp_path / "good", good)]
    launch.train(jobs, tmp_path, Console(quiet=True), stop=False)
    assert jobs[0].failure and not jobs[0].done and jobs[1].is_finished and not jobs[1].failure
    with pytest.raises(ValueError, match="run 'nan, seed 1' failed: .*log"):
        launch.train(jobs, tmp_path, Console(quiet=True))
    assert not jobs[1].done and not under(tmp_path)


@pytest.mark.parametrize(
    "bad, timed, tried",
    [
        ((), "cone", ["cone"]), (("cone",), "topk", ["cone", "general", "topk"]),
        (("cone", "topk", "mix:0.1"), "general", ["cone", "general", "topk", "mix:0.1"]),
        (("cone", "general"), None, ["cone", "general"]),
    ],
)  # fmt: skip
def test_what_is_timed(
    bad: tuple[str, ...], timed: str | None, tried: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The dearest arm that can be run; where the cheapest can't, it is not the arm's fault."""
    arms, seen = parse("general,mix:0.1,cone,topk"), []

    def finish(jobs: list[Job], *_: object, stop: bool) -> None:
        name = jobs[0].name.removeprefix("timing ")
        seen.append(name)
        if name in bad:
            raise ValueError(f"{name} failed")

    monkeypatch.setattr(compare, "finish", finish)
    args, quiet = argparse.Namespace(), Console(quiet=True)
    if timed is None:
        with pytest.raises(ValueError, match="general failed"):
            compare.time_one(plan(tmp_path), arms, args, quiet)
    else:
        assert compare.time_one(plan(tmp_path), arms, args, quiet).arm == f"timing {timed}"
    assert seen == tried


def test_two_that_share_a_plan(tmp_path: Path) -> None:
    """Each run is taken by one of them; one that needs another's checkpoint waits for it."""
    jobs = [job(f"{n}", 0, 1, tmp_path / f"{n}", "", after=tmp_path / "0") for n in range(5)]
    write_jobs(jobs, tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan[0]["after"] = None
    one, two = runs._free(plan), runs._free(plan)
    assert next(one) == 0
    waiting = Thread(target=lambda: taken.append(next(two)))
    taken: list[int] = []
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive() and not taken
    (tmp_path / "0" / "done").touch()
    waiting.join()
    assert taken == [1] and sorted([*one, *two]) == [2, 3, 4]


def test_a_finished_run_is_known_by_its_fingerprint(tmp_path: Path) -> None:
    made = job("cone", 1, 4, tmp_path, "--lr 1")
    assert not made.is_finished
    (tmp_path / "done").write_text(json.dumps({"fingerprint": made.fingerprint}))
    assert made.is_finished and not job("cone", 1, 4, tmp_path, "--lr 2").is_finished
    (tmp_path / "done").write_text("")  # of an older version
    assert not made.is_finished


@pytest.mark.parametrize(
    "more, said",
    [
        ("--steps 0", "--steps must be at least 1"), ("--steps 4 --budget 3m", "drop one"),
        ("--budget soon", "--budget soon"), ("--arms nothing", "--arms nothing"),
        ("--seed 3", "--seed: compare gives"), ("--model m --base-steps 3", "--base-steps is of"),
        ("--ranks 3 --tensor-model-parallel-size 2", "--ranks 3 must be"),
        ("--tokenizer nowhere", "--tokenizer nowhere: no folder"), ("", "few.jsonl: 1 different"),
        ("--metrics bleu", "--metrics bleu: no such metric"),
        ("--metrics f1", "--metrics asks for answers to the target's test records: "),
        ("--metrics tests.nowhere:f", "reward 'tests.nowhere:f' can't be loaded: No module"),
        ("--metrics-target few.jsonl", "--metrics-target needs --metrics"),
        ("--dr-generate-tokens=4", "--dr-generate-tokens needs --metrics"),
        ("--dr-generate few.jsonl", "--dr-generate: compare gives"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, more: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = write(tmp_path / "few.jsonl", ["a"])
    many = write(tmp_path / "many.jsonl", [f"{n}" for n in range(40)])
    other = write(tmp_path / "other.jsonl", [f"n {n}" for n in range(40)])
    target = many if more else few
    argv = ["--target", target, "--general", other, "--dr-device", "cpu", "--out",
            str(tmp_path / "out"), *more.split()]  # fmt: skip
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("compare: error: ") and said in error and error.count("\n") == 1
