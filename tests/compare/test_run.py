"""The command itself: a tiny comparison through Megatron's loop, and the same command again."""

import json
from pathlib import Path
from threading import Thread

import pytest

from megatron_dr.cli.compare import main
from megatron_dr.compare import launch
from megatron_dr.compare.jobs import job
from megatron_dr.compare.jobs import write as write_jobs
from megatron_dr.mcore.loop import runs

ROOT = Path(__file__).parents[2]
TINY = """--num-layers 1 --hidden-size 16 --num-attention-heads 2 --ffn-hidden-size 16
    --seq-length 16 --global-batch-size 2"""


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two arms, one seed; then nothing is left to do, and the results are the same."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})  # one run at a time
    target = write(tmp_path / "t.jsonl", [f"el {n}" for n in range(16)])
    general = write(tmp_path / "g.jsonl", [f"the {n}" for n in range(24)])
    argv = ["--target", target, "--general", general, "--arms", "mix:0.1,cone", "--seeds", "1",
            "--steps", "4", "--base-steps", "2", "--dr-target-batch-size", "2", "--dr-device",
            "cpu", "--out", str(tmp_path / "out"), *TINY.split()]  # fmt: skip
    assert main(argv) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert "target: 16 records, 8 to train on, 4 for validation, 4 for the test" in said
    assert "2 arms x 1 seed(s), 4 steps each, after a base model's 2, 1 run(s) at a time" in said
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["compared with"] == "mix:0.1" and "One seed" in found["advice"]
    assert all(0 < found["before"][name] < 10 for name in found["before"])
    values = {name: own["target test"]["values"] for name, own in found["arms"].items()}
    assert all(0 < loss < 10 for losses in values.values() for loss in losses)

    def never(*_: object) -> None:
        raise AssertionError("a finished run is run again")

    monkeypatch.setattr(launch, "train", never)
    assert main(argv) == 0
    assert "3 of 3 runs are finished; 0 to do" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    write(tmp_path / "t.jsonl", [f"la {n}" for n in range(16)])  # other data
    with pytest.raises(AssertionError, match="run again"):
        main(argv)
    assert "0 of 1 runs are finished; 1 to do, 1 of them anew" in capsys.readouterr().out


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
