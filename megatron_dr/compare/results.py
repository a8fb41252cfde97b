"""What came out of a comparison: chosen on validation, reported on the test."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_dr.compare import figures, generated
from megatron_dr.compare.arms import Arm, baseline
from megatron_dr.compare.budget import SETS
from megatron_dr.compare.jobs import Job

UNIT = "nats per token"
LOSS = "lm loss"
CLEAR = 2.0  # standard errors from which a difference is called one

Curve = dict[str, dict[int, float]]  # of a run: set -> step -> loss


@dataclass(frozen=True)
class Outcome:
    """Of an arm, at the step that was best on the target's validation.

    Attributes:
        step: of the lowest mean over seeds.
        valid: the target's validation loss of each seed.
        target, general: the test losses of each seed.
    """

    step: int
    valid: list[float]
    target: list[float]
    general: list[float]


def curve(job: Job) -> Curve:
    """The losses of a run, by set and step."""
    return {name: {line["iteration"]: line[LOSS] for line in job.lines(f"validation-{name}")}
            for name in SETS}  # fmt: skip


def failure(jobs: Sequence[Job], metrics: Sequence[str] = ()) -> str | None:
    """Why an arm with these runs is not compared: a run failed, or a loss or metric is not a
    number. None where all came to their end: an arm of the seeds that went well would look better
    than it is."""
    for job in jobs:
        if job.failure is not None:
            return f"seed {job.seed}: {job.failure}"
        losses = curve(job)
        steps = {tuple(found) for found in losses.values()}
        if len(steps) > 1 or () in steps:
            return f"seed {job.seed}: not all held-out sets were evaluated ({job.folder})"
        for name, found in losses.items():
            step = next((step for step, loss in found.items() if not math.isfinite(loss)), None)
            if step is not None:
                return (f"seed {job.seed}: the {name} loss is {found[step]} at step {step} "
                        f"({job.folder})")  # fmt: skip
        unscored = generated.failure(job, metrics)
        if unscored is not None:
            return f"seed {job.seed}: {unscored}"
    return None


def outcome(curves: Sequence[Curve]) -> Outcome:
    """Of an arm's seeds."""
    means = {step: statistics.mean(curve["target"][step] for curve in curves)
             for step in curves[0]["target"]}  # fmt: skip
    step = min(means, key=lambda step: means[step])
    valid, target, general = ([curve[name][step] for curve in curves]
                              for name in ("target", "target-test", "general-test"))  # fmt: skip
    return Outcome(step, valid, target, general)


def best(outcomes: Mapping[str, Outcome], names: Sequence[str]) -> str | None:
    """Of these arms the one with the lowest mean target validation loss; None of none."""
    return min(names, key=lambda name: statistics.mean(outcomes[name].valid), default=None)


def advice(outcomes: Mapping[str, Outcome], arms: Sequence[Arm]) -> str:
    """One sentence: which arm, and by how many standard errors."""
    mix = best(outcomes, [arm.name for arm in arms if arm.is_mix])
    base = baseline(arms, mix)
    others = [arm.name for arm in arms if not arm.is_mix and arm.name != base]
    called = f"the tuned mix ({base})" if mix else base
    first = best(outcomes, others)
    if first is None:
        return f"Use {base}: there is no other arm to compare it with."
    gap = figures.paired(outcomes[first].target, outcomes[base].target)
    general = figures.paired(outcomes[first].general, outcomes[base].general)
    kept = f"its general test loss is {abs(general.mean):.3f} {_side(general.mean)}"
    said = f"{first}, the best of the others on validation, is {abs(gap.mean):.3f} {UNIT}"
    seeds = len(outcomes[first].target)
    if gap.se is None:
        return (f"One seed has no standard error: {said} {_side(gap.mean)} {called} on the "
                f"target's test, and {kept}; run more --seeds before you choose.")  # fmt: skip
    errors = f"{abs(figures.in_errors(gap)):.1f} standard errors of {seeds} seeds"
    if gap.mean < 0 and abs(gap.mean) >= CLEAR * gap.se:
        return (f"Use {first}: its target test loss is {abs(gap.mean):.3f} {UNIT} below {called} "
                f"({errors}), and {kept}.")  # fmt: skip
    return (f"No arm beats {called} by {CLEAR:g} standard errors; use {base} "
            f"({said} {_side(gap.mean)} on the target's test, {errors}; {kept}).")  # fmt: skip


def _side(difference: float) -> str:
    return "below" if difference < 0 else "above"


def gather(
    arms: Sequence[Arm], jobs: Sequence[Job], start: Job, metrics: Sequence[str] = ()
) -> tuple[dict[str, list[Curve]], dict[str, Any]]:
    """(arm -> the curves of its seeds, all that results.json has).

    Args:
        jobs: the arms' runs.
        start: a run whose last evaluation is of what the arms begin from.
        metrics: of the runs' answers.

    Raises:
        ValueError: every arm failed.
    """
    every = {arm.name: [job for job in jobs if job.arm == arm.name] for arm in arms}
    reasons = {name: failure(own, metrics) for name, own in every.items()}
    failed = {name: reason for name, reason in reasons.items() if reason is not None}
    arms = [arm for arm in arms if arm.name not in failed]
    jobs = [job for job in jobs if job.arm not in failed]
    if not arms:
        name, reason = next(iter(failed.items()))
        raise ValueError(f"all arms failed; {name}, {reason}")
    curves = {arm.name: [curve(job) for job in jobs if job.arm == arm.name] for arm in arms}
    outcomes = {name: outcome(found) for name, found in curves.items()}
    mix = best(outcomes, [arm.name for arm in arms if arm.is_mix])
    base = baseline(arms, mix)
    timed = _times(figures.step_times(jobs), base)
    of_arms = {
        name: {**_losses(own, outcomes[base]), **timed[name], **_runs(every[name], metrics)}
        for name, own in outcomes.items()
    }
    first = {name: list(values.values())[-1] for name, values in curve(start).items()}
    return curves, {
        "unit": UNIT, "seeds": sorted({job.seed for job in jobs}), "steps": jobs[0].steps,
        "before": first, "before, metrics": generated.summary([start], metrics),
        "compared with": base, "best mix on validation": mix,
        "arms": of_arms, "failed": failed, "advice": advice(outcomes, arms),
    }  # fmt: skip


def _losses(own: Outcome, base: Outcome) -> dict[str, Any]:
    """Of an arm, as results.json has it; differences are from `base`."""
    return {
        "step": own.step, "target validation": figures.summary(own.valid),
        "target test": figures.summary(own.target), "general test": figures.summary(own.general),
        "target test, difference": figures.paired(own.target, base.target).as_json(),
        "general test, difference": figures.paired(own.general, base.general).as_json(),
    }  # fmt: skip


def _times(seconds: Mapping[str, float], base: str) -> dict[str, dict[str, float]]:
    """Of each arm's training step, as results.json has it; relative to `general`, if it is one."""
    of = seconds.get("general", seconds[base])
    return {name: {"step seconds": own, "step time": own / of} for name, own in seconds.items()}


def _runs(own: Sequence[Job], metrics: Sequence[str]) -> dict[str, Any]:
    """Of an arm's runs as wholes, as results.json has it."""
    return {
        "run seconds": statistics.mean(job.done["seconds"] for job in own),
        "memory": max(job.done["memory"] for job in own),
        "metrics": generated.summary(own, metrics),
    }


def write(
    arms: Sequence[Arm], jobs: Sequence[Job], start: Job, out: Path, console: Console,
    metrics: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """results.json, table.md, curves.png and pareto.png in the output folder; the table, what
    failed and the advice on the screen."""
    from megatron_dr.compare import pictures

    curves, found = gather(arms, jobs, start, metrics)
    (out / "results.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    table(found, out / "table.md", console, metrics)
    said = [*(f"{name} failed: {reason}" for name, reason in found["failed"].items()),
            *generated.unscored(found["arms"], metrics), found["advice"]]  # fmt: skip
    with (out / "table.md").open("a", encoding="utf-8") as file:
        file.writelines(f"\n{line}\n" for line in said)
    for line in said:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    seeds = len(found["seeds"])
    pictures.curves(curves, found["before"], UNIT, seeds, out / "curves.png")
    before, base = found["before"], found["compared with"]
    star = f"{base} (compared with)"
    points = {"before": ([before["general-test"]], [before["target-test"]])}
    colours = {}  # as in the curves
    for number, (name, own) in enumerate(found["arms"].items()):
        label = star if name == base else name
        points[label] = own["general test"]["values"], own["target test"]["values"]
        colours[label] = f"C{number}"
    labels = f"general test loss ({UNIT})", f"target test loss ({UNIT})"
    title = f"Lower left is better (mean ± sd of {seeds} seed(s))"
    pictures.pareto(points, out / "pareto.png", before["target-test"], labels, title, star,
                    colours)  # fmt: skip
    return found


def table(found: dict[str, Any], path: Path, console: Console, metrics: Sequence[str] = ()) -> None:
    """A row for each arm; those that failed are the last."""
    base, before = found["compared with"], found["before"]

    def scored(own: dict[str, Any]) -> list[str]:
        return [figures.with_error(own[name]) if name in own else "" for name in metrics]

    rows = [["before", f"{before['target-test']:.3f}", f"{before['general-test']:.3f}", "", "",
             *scored(found["before, metrics"])]]  # fmt: skip
    for name, own in found["arms"].items():
        gap = figures.Difference(**own["target test, difference"])
        ratio = "" if gap.se is None or name == base else f"{figures.in_errors(gap):+.1f}"
        rows.append([
            name + " (compared with)" * (name == base), figures.with_error(own["target test"]),
            figures.with_error(own["general test"]),
            "" if name == base else figures.with_error(gap.as_json(), "+.3f"), ratio,
            *scored(own["metrics"]), str(own["step"]), f"{own['step time']:.2f}",
            f"{own['run seconds']:.0f}", f"{own['memory'] / 2**30:.1f}",
        ])  # fmt: skip
    header = ["arm", "target test", "general test", "target, difference", "in se", *metrics,
              "at step", "step time", "run, s", "GiB"]  # fmt: skip
    rows += [[name, "failed"] for name in found["failed"]]
    rows = [row + [""] * (len(header) - len(row)) for row in rows]
    title, caption = _said(found, metrics)
    figures.table(title, header, rows, path, console, caption, bold="(compared with)")


def _said(found: dict[str, Any], metrics: Sequence[str]) -> tuple[str, str]:
    """What is above the table and below it."""
    base = found["compared with"]
    title = (f"Test loss, {UNIT}, mean ± standard error of {len(found['seeds'])} seed(s), at the "
             "step that was best on the target's validation")  # fmt: skip
    if metrics:
        title += f"; {', '.join(metrics)} of answers by the weights at the run's end"
    reference = "general" if "general" in found["arms"] else base
    return title, (f"difference: paired over seeds, from {base}; step time: median, relative to "
                   f"{reference}; GiB: of main memory, the most of one process")  # fmt: skip
