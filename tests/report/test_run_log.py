"""A run is read from its metrics, whole, still going, or gone on from a checkpoint."""

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_dr.report import about, panels, run_log, sparkline, status
from megatron_dr.report.follow import Follower
from megatron_dr.report.metrics import MetricsFile
from megatron_dr.report.run_log import Curve

from ._runs import write


def steps(run: run_log.RunLog, kind: str) -> list[int]:
    return [line["iteration"] for line in run.kinds[kind]]


def test_a_run_by_its_folder_or_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "metrics.jsonl")
    for given in (path, path.parent):
        run = run_log.read(given)
        assert (run.name, run.step, run.steps, run.has_ended) == ("a", 6, 6, True)
        assert steps(run, "validation") == [3, 6] and steps(run, "blocks") == [1, 2, 3, 4, 5, 6]
    curve = run.curve("train", "lm loss")
    assert curve is not None and curve.values[0] == 2.9 and run.curve("train", "none") is None
    other = write(tmp_path / "b" / "other.jsonl")
    (tmp_path / "b" / "other.generated.jsonl").write_text('{"origin": "x"}\n')
    assert run_log.find(other.parent) == other and run_log.read(other).name == "other"


def test_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    for name, says in (("none", "no such run"), ("empty", "no metrics.jsonl is .*: none: name the"),
                       ("text.jsonl", "no metrics of a run")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: {says}.*[.]$"):
            run_log.read(tmp_path / name)
    write(tmp_path / "two" / "a.jsonl")
    write(tmp_path / "two" / "b.jsonl")
    with pytest.raises(ValueError, match="other metrics there: a.jsonl, b.jsonl: name the file"):
        run_log.read(tmp_path / "two")
    with pytest.raises(ValueError, match="the same run twice"):
        run_log.read_all([tmp_path / "two" / "a.jsonl"] * 2)


def test_a_run_that_has_just_begun_has_no_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.touch()
    assert run_log.read(path).step == 0 and "no step yet" in status.sentence(run_log.read(path))


def test_a_line_that_is_being_written_is_no_line(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", ends=False)
    whole = path.read_bytes()
    path.write_bytes(whole[:-25])  # of the last validation
    run = run_log.read(path)
    assert run.step == 6 and steps(run, "validation") == [3] and not run.has_ended
    path.write_bytes(b'12\n{"kind": 3}\n\xff\n[]\n' + whole)
    assert steps(run_log.read(path), "validation") == [3, 6]


def test_what_a_resumed_run_does_again_counts_once(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", ends=False)
    file = MetricsFile(str(path))
    file.begin(4, {"steps": 8, "blocks": ["model"]})
    file.write("train", 5, {"lm loss": 9.0})
    run = run_log.read(path)
    assert steps(run, "train") == [1, 2, 3, 4, 5] and run.kinds["train"][-1]["lm loss"] == 9.0
    assert steps(run, "validation") == [3] and run.steps == 8
    assert run.of_blocks("dr rows") == ([], [])  # of other blocks


def test_a_log_without_first_line_that_goes_back(tmp_path: Path) -> None:
    file = MetricsFile(str(tmp_path / "metrics.jsonl"))
    for step in (1, 2, 3, 2, 3, 4):
        file.write("train", step, {"lm loss": 1.0})
        file.write("validation", step, {"lm loss": 1.0})
    run = run_log.read(tmp_path)
    assert steps(run, "train") == steps(run, "validation") == [1, 2, 3, 4] and run.about == {}


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    paths = [write(tmp_path / name / "seed" / "metrics.jsonl") for name in "ab"]
    assert [run.name for run in run_log.read_all(paths)] == ["a/seed", "b/seed"]


def test_it_is_read_as_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(str(path))
    follower = Follower(path)
    assert follower.read() == []
    file.write("train", 1, {"lm loss": 1.0})
    with path.open("ab") as half:
        half.write(b'{"kind": "train", "itera')
    assert [line["iteration"] for line in follower.read()] == [1]
    with path.open("ab") as half:
        half.write(b'tion": 2}\n')
    assert [line["iteration"] for line in follower.read()] == [2] and follower.run.step == 2
    path.write_text('{"kind": "train", "iteration": 1}\n')  # anew
    assert follower.read() and follower.run.step == 1
    path.unlink()
    with pytest.raises(ValueError, match="can't be read"):
        follower.read()


def test_nan_stays_nan() -> None:
    curve = Curve([1, 2, 3, 4], [1.0, math.nan, 2.0, 4.0])
    thin, size = curve.thinned(2)
    assert size == 2 and math.isnan(thin.values[0]) and thin.values[1] == 3.0
    assert curve.thinned(4) == (curve, 1) and curve.not_finite == [2]
    assert (curve.extreme(min), curve.extreme(max)) == (1.0, 4.0)
    assert math.isnan(Curve([1], [math.inf]).extreme(min))
    assert sparkline.drawn(curve, 4) == "▁×▃█" and sparkline.drawn(curve, 2) == "×▆"
    assert sparkline.drawn(Curve([1, 2], [math.nan] * 2), 4) == "××"


def test_no_figure_is_left_out(tmp_path: Path) -> None:
    """Also those that nobody has thought of."""
    more = {"kl": 0.1, "target kl": 0.2, "dr weight a": 0.5, "new": 7.0}
    run = run_log.read(write(tmp_path / "metrics.jsonl", **more))
    found = panels.panels([run])
    shown = sum(len(panel.curves) for panel in found)
    names = [n for kind in ("train", "validation") for n in run.names(kind)]
    assert shown == len(names)
    assert {"kl", "new"} <= {panel.title for panel in found if panel.section == panels.OTHERS}
    (kl,) = (panel for panel in found if panel.title == "kl")
    assert kl.labels == ["kl", "target kl"]
    (sent,) = (panel for panel in found if panel.unit == "kB a step")
    assert sent.curves[0][2].last == pytest.approx(16.384)


@pytest.mark.parametrize(
    "process, ends, says, goes_on",
    [
        ({}, True, "Ended at step 6 of 6", False),
        ({}, False, "Still going, at step 6 of 6", True),
        ({"created": 5.0}, False, "Stopped at step 6 of 6, before its end", False),
        ({"pid": 2**22 + 1}, False, "Stopped at step 6", False),
        ({"host": "elsewhere"}, False, "At step 6 of 6, still going or stopped", None),
        ({"space": "another"}, False, "At step 6 of 6, still going or stopped", None),
        ({"pid": "x"}, False, "At step 6 of 6, still going or stopped", None),
    ],
)
def test_where_a_run_stands(
    tmp_path: Path, process: dict[str, Any], ends: bool, says: str, goes_on: bool | None
) -> None:
    here = about.process()
    run = run_log.read(
        write(tmp_path / "metrics.jsonl", about={"process": here | process}, ends=ends)
    )
    assert status.sentence(run).startswith(says) and status.goes_on(run) is goes_on


def test_how_much_is_left(tmp_path: Path) -> None:
    here = about.process()
    of = {"process": here, "steps": 606}
    run = run_log.read(write(tmp_path / "metrics.jsonl", about=of, ends=False))
    assert "about 5 min are left" in status.sentence(run)


def test_the_gpus_of_each_node_are_beside(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"kind": "train", "iteration": 2, "lm loss": 1.0}\n')
    for node, used in (("a-1", 5.0), ("b-1", 6.0)):
        lines = [f'{{"kind": "gpus", "iteration": {n}, "memory GiB 0": {used}}}' for n in (1, 2, 2)]
        (tmp_path / f"m.gpus.{node}.jsonl").write_text("\n".join(lines) + "\n")
    found = run_log.read(tmp_path)
    assert found.path == tmp_path / "m.jsonl" and found.step == 2
    (panel,) = [p for p in panels.panels([found]) if p.title == "Memory of GPUs"]
    assert [(label, c.steps, c.values) for _, label, c in panel.curves] == [
        ("0, a-1", [1, 2], [5.0, 5.0]), ("0, b-1", [1, 2], [6.0, 6.0]),
    ]  # fmt: skip
