"""Compare arms (general data alone, mixes, projections) on data of your own; docs/compare.md.

    megatron-dr compare --target T.jsonl --general G.jsonl [--model DIR] \\
        --arms general,target,mix:0.1,mix:0.3,topk,cone,auto --seeds 3 --budget 30m \\
        [flags of megatron_dr.train]

Both files are split into training, validation and test records. Each arm trains with each seed from
the same start: a Hugging Face model, or a small one that is first trained on the general data. What
is chosen (the best mix, each arm's step) is chosen on validation, what is reported is of the test.
Further flags of megatron_dr.train go to every run. The same command goes on with what an earlier
one finished in the same folder. An arm that fails is said to have failed, and the others go on.
"""

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_dr.cli.main import parser_of
from megatron_dr.compare import arms as arms_
from megatron_dr.compare import budget, generated, launch, results, splits, start
from megatron_dr.compare.arms import Arm
from megatron_dr.compare.jobs import Job, read_table
from megatron_dr.compare.plan import BASE_STEPS, TOKENS, Plan, check_flags, data_ranks, number
from megatron_dr.report import answers

DEVICE = "MEGATRON_DR_DEVICE"
ARMS = "general,target,mix:0.1,mix:0.3,topk,cone,auto"
BUDGET = "30m"
MOST = 100  # steps that a budget gives, where a pass over the general data is less
BASE_SHARE = 0.25  # of the budget, for a base model from scratch


FLAGS: dict[str, dict[str, Any]] = {
    "--target": {"required": True, "metavar": "DATA",
                 "help": "the target's samples: a file or folder"},
    "--general": {"required": True, "metavar": "DATA", "help": "the general samples"},
    "--model": {"type": Path, "metavar": "DIR",
                "help": "Hugging Face model to begin from (default: a small GPT from scratch)"},
    "--tokenizer": {"type": Path, "metavar": "DIR",
                    "help": "of the model from scratch (default: bytes)"},
    "--arms": {"default": ARMS, "help": f"with commas: {arms_.FORMS} (default: {ARMS})"},
    "--seeds": {"type": int, "default": 3, "help": "runs of each arm (default: 3)"},
    "--budget": {"help": "time of it all, as 90s, 30m, 2h: sets the steps, and fewer --seeds if "
                 "need be (default: " + BUDGET + ")"},
    "--steps": {"type": int, "help": "training steps of a run, in place of --budget"},
    "--base-steps": {"type": int, "help": "of the model from scratch on the general data (default: "
                     f"{BASE_STEPS}, or what a quarter of --budget allows)"},
    "--metrics": {"help": "with commas, of answers to the target's test prompts by each run's last "
                  f"weights: {', '.join(answers.METRICS)}, or a reward as module:function "
                  "(default: losses alone)"},
    "--metrics-target": {"metavar": "FILE", "help": "samples to answer in place of the target's "
                         "test records"},
    "--ranks": {"type": int, "default": 1, "help": "processes of a run (default: 1)"},
    "--split-seed": {"type": int, "default": 0, "help": "(default: 0)"},
    "--out": {"type": Path, "default": Path("runs/compare"),
              "help": "folder of all that is written (default: runs/compare)"},
    "--dr-target-batch-size": {"type": int, "default": 8, "help": "target samples of a step, in "
                               "the arms that have them (default: 8)"},
    "--dr-device": {"choices": ("cuda", "cpu"), "default": os.environ.get(DEVICE),
                    "help": "(default: cuda where there is a GPU)"},
}  # fmt: skip


def arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and the flags of every run.

    Raises:
        ValueError: a number out of range, or flags that no run can have.
    """
    parser = parser_of("compare", __doc__)
    parser.allow_abbrev = False  # a run's flag may begin as ours
    for flag, options in FLAGS.items():
        parser.add_argument(flag, **options)
    args, more = parser.parse_known_args(argv)
    for name in ("seeds", "steps", "base_steps", "ranks", "dr_target_batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")
    if args.steps and args.budget:
        raise ValueError("--steps and --budget both say how long a run is: drop one.")
    if args.model and (args.tokenizer or args.base_steps):
        flag = "--tokenizer" if args.tokenizer else "--base-steps"
        raise ValueError(f"{flag} is of a model from scratch, and --model has its own: drop one.")
    if args.metrics is not None:
        answers.parse("--metrics", args.metrics)
    else:
        given = {"--metrics-target": args.metrics_target, TOKENS: number(more, TOKENS, 0)}
        for flag in (flag for flag, value in given.items() if value):
            raise ValueError(f"{flag} needs --metrics: give it, or drop the flag.")
    budget.seconds(args.budget or BUDGET)
    check_flags(more)
    return args, more


def planned(args: argparse.Namespace, more: list[str], console: Console) -> Plan:
    """Data, device and start, ready."""
    out, device = args.out.resolve(), args.dr_device
    if device is None:
        device = "cuda" if launch.visible_gpus() else "cpu"
        console.print(f"device: {device} (--dr-device says otherwise)", highlight=False)
    ranks = data_ranks(more, args.ranks)
    found = splits.make(args.target, args.general, out / "data", args.split_seed)
    test, train = (found.files["target"][part] for part in ("test", "train"))
    metrics = generated.metrics(args.metrics, args.metrics_target, test)
    note = "" if metrics is None else generated.overlap(metrics, train)
    for line in filter(None, (*found.said, note)):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if args.model:
        begin = start.from_model(args.model, out, console)
    else:
        begin = start.from_scratch(args.tokenizer, out)
    return Plan(out, begin, found, args.dr_target_batch_size, tuple(more), device, ranks, metrics)


def finish(
    jobs: Sequence[Job], plan: Plan, args: argparse.Namespace, console: Console, beside: int = 1,
    stop: bool = False,
) -> None:  # fmt: skip
    """Run what is not finished; `stop`: with the first run that fails.

    Raises:
        ValueError: at a run that failed.
    """
    left = [job for job in jobs if not job.is_finished]
    changed = sum(bool(job.done) for job in left)
    if len(left) < len(jobs) or changed:
        anew = f", {changed} of them anew: flags, data or start have changed" if changed else ""
        console.print(f"{len(jobs) - len(left)} of {len(jobs)} runs are finished; {len(left)} to do"
                      f"{anew}", soft_wrap=True)  # fmt: skip
    if left:
        launch.train(left, plan.out, console, args.ranks, min(beside, len(left)), stop)


def time_one(plan: Plan, arms: list[Arm], args: argparse.Namespace, console: Console) -> Job:
    """A short run of the arm that takes most; where that fails, of the next one that does not.

    Raises:
        ValueError: the one that takes least fails, too: it's not the arm.
    """

    def attempt(arm: Arm) -> Job:
        timed = plan.timed(arm)
        finish([timed], plan, args, console, stop=True)
        return timed

    first, *others = sorted(arms, key=lambda arm: (not arm.weighs_rows, not arm.uses_target))
    try:
        return attempt(first)
    except ValueError as error:
        if not others:
            raise
        console.print(f"{error}: another is timed", soft_wrap=True, markup=False, highlight=False)
    least = attempt(others[-1])
    for arm in others[:-1]:
        with contextlib.suppress(ValueError):
            return attempt(arm)
    return least


def lengths(
    args: argparse.Namespace, plan: Plan, arms: list[Arm], timed: Job, beside: int
) -> list[int]:
    """Steps of the base model, steps of an arm's run, seeds; as chosen before, where all that they
    were chosen from is the same but for the machine's free memory."""
    asked = [timed.fingerprint, args.arms, args.seeds, args.budget, args.steps, args.base_steps]
    path = plan.out / "lengths.json"
    kept = read_table(path)
    if kept.get("asked") != asked or not isinstance(kept.get("chosen"), list):
        kept = {"asked": asked, "chosen": choose(args, plan, len(arms), timed, beside)}
        path.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    return list(kept["chosen"])


def choose(
    args: argparse.Namespace, plan: Plan, arms: int, timed: Job, beside: int
) -> tuple[int, int, int]:
    """As `lengths`, from --steps or --budget."""
    found = budget.Measured.of(timed)
    left = 0.0 if args.steps else budget.seconds(args.budget or BUDGET) - timed.done["seconds"]
    base = 0
    if plan.start.checkpoint is None:
        within = BASE_STEPS if args.steps else int(BASE_SHARE * left / found.step)
        base = args.base_steps or max(1, min(BASE_STEPS, within))
        left -= found.start + base * found.step
    if args.steps:
        return base, args.steps, args.seeds
    most = max(MOST, plan.splits.counts["general"]["train"] // plan.batch)
    return base, *budget.fit(left, arms, args.seeds, beside, found, most)


def room(args: argparse.Namespace, plan: Plan, runs: int, timed: Job) -> int:
    """Runs side by side."""
    import psutil

    cores, gpus = os.sched_getaffinity(0), launch.visible_gpus()
    places = len(cores if plan.device == "cpu" else gpus)
    free = psutil.virtual_memory().available
    return budget.beside(runs, args.ranks, places, free, timed.done["memory"])


def run(args: argparse.Namespace, more: list[str], console: Console) -> None:
    """The whole comparison.

    Raises:
        ValueError: bad input, or no arm whose runs all came to their end.
    """
    arms = arms_.parse(args.arms)
    plan = planned(args, more, console)
    timed = time_one(plan, arms, args, console)
    beside = room(args, plan, len(arms) * args.seeds, timed)
    base_steps, steps, seeds = lengths(args, plan, arms, timed, beside)
    base = plan.base(base_steps) if plan.start.checkpoint is None else None
    runs = [plan.arm(arm, seed, steps, base) for seed in range(1, seeds + 1) for arm in arms]
    found = budget.Measured.of(timed)
    fewer = f" (--seeds {args.seeds} do not fit)" if seeds < args.seeds else ""
    first = f", after a base model's {base_steps}" if base else ""
    minutes = (budget.all_of(found, len(runs), beside, steps) + base_steps * found.step) / 60
    console.print(
        f"{len(arms)} arms x {seeds} seed(s){fewer}, {steps} steps each{first}, {beside} run(s) at "
        f"a time: {minutes:.1f} minutes at {found.step:.2g} s a step, as {timed.name} took\n"
        f"Logs, metrics and checkpoints: {plan.out}", soft_wrap=True, highlight=False,
    )  # fmt: skip
    finish(runs if base is None else [base, *runs], plan, args, console, beside)
    names = () if plan.metrics is None else plan.metrics.names
    results.write(arms, runs, base or timed, plan.out, console, names)
    console.print(f"{plan.out}: results.json, table.md, curves.png, pareto.png", soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 2 for what can't be compared, in one sentence."""
    warnings.filterwarnings("ignore", module=r"torch\.distributed")
    try:
        args, more = arguments(argv)
        run(args, more, Console())
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print("compare: stopped; the same command goes on from here.", file=sys.stderr)
        return getattr(stopped, "code", 130)
    return 0
