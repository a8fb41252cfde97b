"""What alpha does in training, and what `--dr-alpha-style auto` chooses.

    python benchmarks/alpha.py [--out runs/alpha] [--seeds 1 2] [--conditions few many none]

The runs are those of `examples/sft/demo.py`, with other target sets, pools and alphas. Each takes
about 20 s on two cores; those that an earlier call finished in the same folder are kept, so the
work can be cut up by seeds and conditions. Writes alpha.json (all figures), table.md and alpha.png
of all that is finished there. docs/alpha.md says what came out.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import alpha_plot
from rich.console import Console

from megatron_dr.compare import figures, launch
from megatron_dr.compare.jobs import Job, job
from megatron_dr.report import metrics

SFT = Path(__file__).resolve().parent.parent / "examples" / "sft"
sys.path.insert(0, str(SFT))

import demo  # noqa: E402  (its own imports are found from here on)

# name -> (target sentences, whether the pool holds more of their language, unlabelled; title)
CONDITIONS = {
    "few": (8, True, "8 targets, useful data hidden in the pool"),
    "many": (64, True, "64 targets, useful data hidden in the pool"),
    "none": (32, False, "32 targets, none of their language in the pool"),
}
CONE, MIX = (0.0, 0.05, 0.1, 0.3, 0.5, 1.0), (0.1, 0.3, 0.5)
FLAGS = {
    **{f"cone, {a:g}": f"--dr-set cone --dr-alpha {a:g}" for a in CONE},
    "cone, auto": "--dr-set cone --dr-alpha-style auto",
    **{f"mix, {a:g}": f"--dr-set mean --dr-alpha {a:g}" for a in MIX},
}
LOSSES = {"target loss": "held-out target", "lm loss": "held-out general"}


def draw(size: int, hidden: bool, seed: int) -> tuple[list[str], list[str]]:
    """Lines of the target set and the pool: the seed draws the targets and takes them out of it."""
    lines = (demo.DATA / "general.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    spanish = [line for line in lines if json.loads(line)["language"] == "es"]
    target = random.Random(seed).sample(spanish, size)
    dropped = set(target if hidden else spanish)
    return target, [line for line in lines if line not in dropped]


def data(out: Path, condition: str, seed: int) -> tuple[Path, Path]:
    """Files of the target set and the pool."""
    size, hidden, _ = CONDITIONS[condition]
    paths = out / f"target-{condition}-{seed}.jsonl", out / f"pool-{condition}-{seed}.jsonl"
    for path, chosen in zip(paths, draw(size, hidden, seed), strict=True):
        path.write_text("".join(chosen), encoding="utf-8")
    return paths


def plan(out: Path, conditions: list[str], seeds: list[int], arms: list[str]) -> list[Job]:
    """The base model's run, then each condition's and seed's."""
    base = out / "base"
    flags = f"{demo.MODEL} {demo.PRETRAIN} --save {base}"
    jobs = [job("base", 0, demo.PRETRAIN_STEPS, base, flags)]
    for condition in conditions:
        for seed in seeds:
            target, pool = data(out, condition, seed)
            for arm in arms:
                flags = (f"{demo.MODEL} {demo.TUNE} --load {base} --seed {seed} "
                         f"--train-data-path {pool} {demo.TARGET.format(target=target)} "
                         f"{FLAGS[arm]}")  # fmt: skip
                to = folder(out, condition, arm, seed)
                name, origin = f"{condition}: {arm}", jobs[0].fingerprint
                jobs.append(job(name, seed, demo.STEPS, to, flags, origin=origin))
    return jobs


def folder(out: Path, condition: str, arm: str, seed: int) -> Path:
    return out / condition / arm.replace(", ", "-") / str(seed)


def run(jobs: list[Job], out: Path, console: Console) -> None:
    """Those of the runs that are not finished."""
    left = [job for job in jobs if not job.is_finished]
    console.print(f"{len(left)} of {len(jobs)} runs to do; logs and metrics: {out}")
    try:
        if left:
            launch.train(left, out, console)
    except ValueError as error:
        sys.exit(str(error))


def gather(out: Path) -> dict[str, Any]:
    """condition -> arm -> final losses [seeds], and alpha and losses by step [seeds][steps]."""
    found: dict[str, Any] = {}
    for condition in CONDITIONS:
        for arm in FLAGS:
            done = sorted(folder(out, condition, arm, 0).parent.glob("*/done"))
            runs = [values(path.parent / "metrics.jsonl") for path in done]
            if runs:
                arms = found.setdefault(condition, {})
                arms[arm] = {key: [run[key] for run in runs] for key in runs[0]}
                arms[arm]["seeds"] = [int(path.parent.name) for path in done]
    return found


def values(path: Path) -> dict[str, Any]:
    """Of one run."""
    last = metrics.read(path, "validation")[-1]
    steps = metrics.read(path, "train")
    alphas = [line["dr alpha"] for line in steps if "dr alpha" in line]
    return {**{key: last[key] for key in LOSSES}, "alpha": alphas}


def table(found: dict[str, Any], base: dict[str, float], console: Console, path: Path) -> None:
    """On the screen and as Markdown: a row per arm, a column per condition and loss."""
    header = ["arm", *(f"{c}: {loss.split()[1]}" for c in found for loss in LOSSES.values())]
    rows = [["base, untrained", *(f"{base[key]:.3f}" for _ in found for key in LOSSES)]]
    for arm in FLAGS:
        cells = [figures.spread(found[c][arm][key]) if arm in found[c] else "" for c in found
                 for key in LOSSES]  # fmt: skip
        rows.append([arm, *cells])
    title = "Final held-out loss, nats per byte, mean ± sd over seeds"
    figures.table(title, header, rows, path, console)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/alpha"), help="output folder")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2], help="of the runs")
    parser.add_argument("--conditions", nargs="*", choices=CONDITIONS, default=list(CONDITIONS))
    parser.add_argument("--arms", nargs="*", choices=FLAGS, default=list(FLAGS))
    options = parser.parse_args()
    out, console = options.out.resolve(), Console()
    out.mkdir(parents=True, exist_ok=True)
    run(plan(out, options.conditions, options.seeds, options.arms), out, console)
    found, base = gather(out), values(out / "base" / "metrics.jsonl")
    result = {"unit": "nats per byte", "base": base, "conditions": found}
    (out / "alpha.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    table(found, base, console, out / "table.md")
    alpha_plot.draw(found, {c: CONDITIONS[c][2] for c in found}, out / "alpha.png")
    console.print(f"Figures, table and picture: {out}/alpha.json, table.md, alpha.png")


if __name__ == "__main__":
    main()
