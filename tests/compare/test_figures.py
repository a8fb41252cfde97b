"""Means, standard errors, paired differences and what is advised, against scipy and by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from megatron_dr.compare import figures, results
from megatron_dr.compare.arms import parse
from megatron_dr.compare.budget import SETS
from megatron_dr.compare.jobs import Job, job
from megatron_dr.compare.results import Outcome

A, B = [2.1, 2.4, 2.2], [2.3, 2.5, 2.5]


def test_against_scipy() -> None:
    assert figures.standard_error(A) == pytest.approx(scipy.stats.sem(A))
    gap = figures.paired(A, B)
    assert gap.mean == pytest.approx(np.mean(A) - np.mean(B))
    assert gap.se == pytest.approx(scipy.stats.sem(np.subtract(A, B)))
    assert figures.in_errors(gap) == pytest.approx(scipy.stats.ttest_rel(A, B).statistic)


def test_one_seed_has_no_error() -> None:
    gap = figures.paired([1.0], [2.0])
    assert gap == figures.Difference(-1.0, None) and figures.with_error(gap.as_json()) == "-1.000"


def of(target: list[float], valid: list[float] | None = None) -> Outcome:
    return Outcome(10, valid or target, target, [1.0] * len(target))


@pytest.mark.parametrize(
    "cone, said",
    [
        ([2.0, 2.1, 2.0], "Use cone: its target test loss is 0.300 nats per token below the tuned "
         "mix (mix:0.3) (5.2 standard errors of 3 seeds), and its general test loss is 0.000"),
        ([2.3, 2.4, 2.2], "No arm beats the tuned mix (mix:0.3) by 2 standard errors; use mix:0.3"),
        ([2.0], "One seed has no standard error"),
    ],
)  # fmt: skip
def test_advice(cone: list[float], said: str) -> None:
    n = len(cone)
    mix = [2.3, 2.5, 2.2] if n == 3 else [2.3]
    found = {"general": of([3.0] * n), "mix:0.1": of([2.6] * n), "mix:0.3": of(mix),
             "cone": of(cone)}  # fmt: skip
    assert results.advice(found, parse("general,mix:0.1,mix:0.3,cone")).startswith(said)


def test_the_mix_is_chosen_on_validation() -> None:
    found = {"mix:0.1": of([2.0], valid=[3.0]), "mix:0.3": of([2.5], valid=[2.9])}
    assert results.best(found, list(found)) == "mix:0.3"
    assert results.best(found, []) is None


LOSSES = {name: [2.0, 1.9] for name in SETS}


def run(folder: Path, arm: str, seed: int, losses: dict[str, list[float]]) -> Job:
    """A finished run with these losses at steps 5 and 10."""
    folder = folder / f"{arm}-{seed}"
    folder.mkdir(parents=True)
    lines = [{"kind": "train", "iteration": n + 1, "step seconds": 0.5} for n in range(10)]
    lines += [{"kind": f"validation-{name}", "iteration": 5 * (n + 1), "lm loss": loss}
              for name in SETS for n, loss in enumerate(losses[name])]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "done").write_text(json.dumps({"seconds": 9.0 + seed, "memory": 2**30}))
    return job(arm, seed, 10, folder, "")


def test_the_step_is_chosen_on_validation_and_read_on_the_test(tmp_path: Path) -> None:
    """Whatever the test says of other steps; the files that are written say the same."""
    shift = {"general": 0.5, "mix:0.1": 0.2, "cone": 0.0}
    jobs = [
        run(tmp_path, arm, seed, {
            "target": [2.0 + more, 2.1 + more], "target-test": [2.2 + more + seed / 10, 1.0],
            "general": [1.5, 1.6], "general-test": [1.7, 1.0],
        })
        for arm, more in shift.items() for seed in (1, 2)
    ]  # fmt: skip
    start = run(tmp_path, "base", 0, {name: [4.0] for name in SETS})
    arms = parse("general,mix:0.1,cone")
    results.write(arms, jobs, start, tmp_path, Console(quiet=True))
    found = json.loads((tmp_path / "results.json").read_text())
    cone = found["arms"]["cone"]
    assert cone["step"] == 5 and cone["target test"]["values"] == pytest.approx([2.3, 2.4])
    assert cone["target test"]["se"] == pytest.approx(scipy.stats.sem([2.3, 2.4]))
    assert cone["target test, difference"]["mean"] == pytest.approx(-0.2)
    assert found["compared with"] == "mix:0.1" and found["before"]["target-test"] == 4.0
    assert cone["step time"] == 1.0 and cone["run seconds"] == 10.5 and cone["memory"] == 2**30
    assert not found["failed"]
    table = (tmp_path / "table.md").read_text()
    assert "| cone | 2.350 ± 0.050 | 1.700 ± 0.000 | -0.200 ± 0.000 |" in table
    assert found["advice"] in table
    assert all((tmp_path / name).stat().st_size for name in ("curves.png", "pareto.png"))


def test_an_arm_that_failed_is_in_the_table_and_the_others_are_compared(tmp_path: Path) -> None:
    """One seed suffices; a loss that is no number fails, wherever it stands."""
    bad = {**LOSSES, "general-test": [2.0, float("nan")]}
    jobs = [run(tmp_path, arm, seed, bad if (arm, seed) == ("topk", 2) else LOSSES)
            for arm in ("mix:0.1", "topk", "cone", "auto") for seed in (1, 2)]  # fmt: skip
    (jobs[4].folder / "failed").write_text("CUDA out of memory (log.0.txt)")
    (jobs[7].folder / "metrics.jsonl").unlink()
    start = run(tmp_path, "base", 0, LOSSES)
    results.write(parse("mix:0.1,topk,cone,auto"), jobs, start, tmp_path, Console(quiet=True))
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["arms"]) == ["mix:0.1"] and found["failed"] == {
        "topk": f"seed 2: the general-test loss is nan at step 10 ({jobs[3].folder})",
        "cone": "seed 1: CUDA out of memory (log.0.txt)",
        "auto": f"seed 2: not all held-out sets were evaluated ({jobs[7].folder})",
    }
    table = (tmp_path / "table.md").read_text()
    assert "| topk | failed |" in table and f"topk failed: {found['failed']['topk']}\n" in table
    with pytest.raises(ValueError, match="all arms failed; cone, seed 1: CUDA out of memory"):
        results.gather(parse("topk,cone")[::-1], jobs, start)


def with_metrics(job: Job, **values: float) -> Job:
    with (job.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "generation", "iteration": 10, **values}) + "\n")
    return job


def test_metrics_of_answers_are_columns(tmp_path: Path) -> None:
    """A metric that is no number fails its arm; answers without a score are said."""
    of_seeds = {"mix:0.1": (0.5, 0.7), "cone": (0.6, 0.9), "topk": (0.5, float("nan"))}
    jobs = [
        with_metrics(run(tmp_path, arm, seed, LOSSES), f1=values[seed - 1], truncated=0.25)
        for arm, values in of_seeds.items() for seed in (1, 2)
    ]  # fmt: skip
    with_metrics(jobs[2], **{"f1": 0.8, "truncated": 0.75, "failed f1": 3})
    jobs.append(run(tmp_path, "auto", 1, LOSSES))
    start = with_metrics(run(tmp_path, "base", 0, LOSSES), f1=0.1, truncated=1.0)
    arms = parse("mix:0.1,cone,topk,auto")
    results.write(arms, jobs, start, tmp_path, Console(quiet=True), ("f1",))
    found = json.loads((tmp_path / "results.json").read_text())
    own = found["arms"]["cone"]["metrics"]
    assert own["f1"]["values"] == [0.8, 0.9] and own["f1"]["mean"] == pytest.approx(0.85)
    assert own["f1"]["se"] == pytest.approx(scipy.stats.sem([0.8, 0.9]))
    assert own["f1"]["failed"] == 3 and own["truncated"] == 0.5
    assert found["failed"] == {
        "topk": f"seed 2: f1 could score no answer ({jobs[5].folder})",
        "auto": f"seed 1: no answers were generated ({jobs[6].folder})",
    }
    table = (tmp_path / "table.md").read_text()
    assert "; f1 of answers by the weights at the run's end" in table
    assert "| in se | f1 | at step |" in table and "| 0.850 ± 0.050 | " in table
    before = next(line for line in table.splitlines() if line.startswith("| before"))
    assert before.startswith("| before | 1.900 | 1.900 |  |  | 0.100 |")
    assert "cone: 3 answers could not be scored by f1 and are left out of its mean." in table
