"""Does a projection, or `auto`, beat a tuned plain mix where training is by rewards?

    python benchmarks/evidence/rl.py run [--seeds 11 12 13 14 15] [--arms "mix 0.2" auto]
    python benchmarks/evidence/rl.py table

The demo's task (`examples/rlvr`: GRPO, sums with one of two forms of answer) with numbers up to 29
in place of 19, so that 400 sums are held out: the reward of a run is good to 0.025, a
difference of two arms over five seeds to less. The target's eight prompts, the general prompts and
all draws are a seed's own. Nothing was chosen on these seeds. What is finished in --out is kept.
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "examples" / "rlvr"))

import arithmetic  # noqa: E402  (found from here on)
import demo  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from megatron_dr.compare import figures, launch  # noqa: E402
from megatron_dr.compare.jobs import Job, job  # noqa: E402

SEEDS = (11, 12, 13, 14, 15)
LARGEST, HELD_OUT, RANKS, STEPS = 29, 400, 1, demo.STEPS
# 16 rows: of 8 completions, which is a prompt's group
ROWS = "--micro-batch-size 8 --dr-rows slot --dr-slots 16 --dr-set cone"
SHARES = (0.1, 0.2, 0.4, 0.7)
ARMS = {
    "general": "--dr-set mean",
    "target": demo.TARGET + "--dr-set target",
    **{f"mix {a:g}": f"{demo.TARGET} --dr-set mean --dr-alpha {a:g}" for a in SHARES},
    **{f"cone {a:g}": f"{demo.TARGET} {ROWS} --dr-alpha {a:g}" for a in (0.0, *SHARES[:3])},
    "auto": f"{demo.TARGET} {ROWS} --dr-alpha-style auto",
    "filter, sample rows": f"{demo.TARGET} --dr-rows sample",
}
VALUES = ("target reward", "reward")


def plan(out: Path, seeds: list[int], arms: list[str]) -> tuple[Job, list[Job]]:
    """(the base model's run, each arm's of each seed)."""
    pairs = arithmetic.sums(0, LARGEST)
    held_out, pool = pairs[:HELD_OUT], pairs[HELD_OUT:]
    out.mkdir(parents=True, exist_ok=True)
    trusted = arithmetic.write(out / "trusted.jsonl", arithmetic.examples(held_out, 0, 0))
    lines = arithmetic.examples(held_out, demo.SIGNED, 0)
    doubtful = arithmetic.write(out / "doubtful.jsonl", lines)
    lines = [x for n in range(8) for x in arithmetic.examples(pool, 0.5, n, wrong=0.4)]
    taught = [{"prompt": line["prompt"], "response": line["answer"]} for line in lines]
    data, folder = arithmetic.write(out / "base.jsonl", taught), out / "base"
    flags = f"{demo.MODEL} {demo.BASE} --save {folder} --train-data-path {data}"
    base, jobs = job("base", 0, demo.BASE_STEPS, folder, flags), []
    for seed in seeds:
        own = [pair for pair in arithmetic.sums(seed, LARGEST) if pair in set(pool)]
        lines = arithmetic.examples(own[: demo.TARGETS], 0, seed)
        target = arithmetic.write(out / f"target-{seed}.jsonl", lines)
        lines = arithmetic.examples(own[demo.TARGETS :], demo.SIGNED, seed)
        general = arithmetic.write(out / f"general-{seed}.jsonl", lines)
        for arm in arms:
            flags = (f"{demo.MODEL} {demo.GRPO} --load {base.folder} --seed {seed} "
                     f"--eval-interval {STEPS // 3} --data-path {general} "
                     f"--dr-rl-valid-data {doubtful} --dr-target-valid-data {trusted} "
                     f"{ARMS[arm].format(target=target)}")  # fmt: skip
            folder = out / str(seed) / arm.replace(", ", "-").replace(" ", "-")
            jobs.append(job(arm, seed, STEPS, folder, flags,
                            after=base.folder, origin=base.fingerprint))  # fmt: skip
    return base, jobs


def run(out: Path, seeds: list[int], arms: list[str], results: Path, console: Console) -> None:
    """What is left of the runs; their rewards after each third go to `results`."""
    base, jobs = plan(out, seeds, arms)
    left = [one for one in (base, *jobs) if not one.is_finished]
    console.print(f"{len(left)} of {len(jobs) + 1} runs to do; logs: {out}")
    try:
        if left:
            launch.train(left, out, console, RANKS, beside=2, stop=False)
    finally:
        kept = {key(line): line for line in read(results)}
        for one in jobs:
            if one.is_finished:
                kept |= {key(line): line for line in lines_of(one)}
        with results.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ("arm", "seed", "step", *VALUES), lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept[k] for k in sorted(kept))
    failed = [one for one in left if one.failure]
    if failed:
        raise ValueError(f"{len(failed)} runs failed: {failed[0].name}: {failed[0].failure}")


def lines_of(one: Job) -> list[dict[str, str]]:
    return [
        {"arm": one.arm, "seed": str(one.seed), "step": str(line["iteration"]),
         **{name: f"{line[name]:.4f}" for name in VALUES}}
        for line in one.lines("validation")
    ]  # fmt: skip


def key(line: dict[str, str]) -> tuple[str, int, int]:
    return line["arm"], int(line["seed"]), int(line["step"])


def read(results: Path) -> list[dict[str, str]]:
    if not results.exists():
        return []
    with results.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(results: Path) -> Table:
    """Held-out rewards at the end, and the target's beside the best mix, paired over seeds."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for line in read(results):
        if int(line["step"]) == STEPS:
            values = {name: float(line[name]) for name in VALUES}
            found.setdefault(line["arm"], {})[int(line["seed"])] = values
    mixes = [arm for arm in found if arm.startswith("mix")]
    if not mixes:
        raise ValueError(f"{results}: no mix in it: run it first.")
    best = max(mixes, key=lambda arm: statistics.mean(v[VALUES[0]] for v in found[arm].values()))
    out = Table(box=box.MARKDOWN, title=f"At step {STEPS}, mean ± standard error")
    for head in ("arm", "seeds", *VALUES, f"target reward beside {best}"):
        out.add_column(head)
    for arm in (arm for arm in ARMS if arm in found):
        own, other = ({s: v[VALUES[0]] for s, v in found[one].items()} for one in (arm, best))
        both = sorted(own.keys() & other.keys())
        gaps = [own[s] - other[s] for s in both]
        cells = [_said([v[name] for v in found[arm].values()]) for name in VALUES]
        out.add_row(arm, str(len(own)), *cells, _said(gaps) if arm != best and gaps else "")
    return out


def _said(values: list[float]) -> str:
    return figures.with_error(figures.summary(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of the runs")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="to run")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence/rl"), help="of the runs")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "rl.csv")
    options = parser.parse_args()
    console = Console()
    try:
        if options.what == "run":
            run(options.out.resolve(), options.seeds, options.arms, options.results, console)
        else:
            console.print(table(options.results))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
