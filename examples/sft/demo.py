"""The main job: a small GPT is taught Spanish from 8 sentences, beside a pool that hides some.

    python examples/sft/demo.py [--out runs/sft] [--seeds 3]

A base model is trained on English, German, Tagalog, Russian and Italian. Then each arm fine-tunes
it with 8 Spanish target sentences and a general pool of which a tenth is Spanish, unlabelled. All
runs go through Megatron-Core's training loop on two CPU processes (`runs.py`). What comes out: a
table of held-out losses (nats per byte) and plots, in the output folder.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import results
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_dr.report import metrics

HERE = Path(__file__).resolve().parent
DATA, PRETRAIN_STEPS, STEPS = HERE / "data", 400, 50

MODEL = f"""
    --num-layers 2 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 384
    --seq-length 64 --max-position-embeddings 64 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --hidden-dropout 0 --attention-dropout 0 --make-vocab-size-divisible-by 8
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model {HERE / "tokenizer"}
    --use-distributed-optimizer --adam-beta2 0.95 --log-interval 20 --dr-device cpu
    --valid-data-path {DATA / "general_heldout.jsonl"} --eval-iters 16
    --eval-global-batch-size 16 --eval-micro-batch-size 8
    --dr-target-valid-data {DATA / "target_heldout.jsonl"}
"""
PRETRAIN = f"""
    --micro-batch-size 16 --global-batch-size 32 --train-iters {PRETRAIN_STEPS}
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 20 --seed 1
    --train-data-path {DATA / "pretrain.jsonl"} --eval-interval {PRETRAIN_STEPS}
    --save-interval {PRETRAIN_STEPS}
"""
TUNE = f"""
    --micro-batch-size 1 --global-batch-size 16 --train-iters {STEPS}
    --lr 2e-3 --min-lr 0 --lr-decay-style linear --lr-warmup-iters 5
    --train-data-path {DATA / "general.jsonl"} --eval-interval 20
    --finetune --no-load-optim --no-load-rng
"""

# name in the table -> flags; an arm without --dr-target-data never sees the target
TARGET = "--dr-target-data {target} --dr-target-batch-size 8 "
ARMS = {
    "general only": "--dr-set mean",
    "target only": TARGET + "--dr-set target --lr 5e-4",  # at 2e-3 it ends far worse
    "mix, 5% target": TARGET + "--dr-set mean --dr-alpha 0.05",
    "mix, 10% target": TARGET + "--dr-set mean --dr-alpha 0.1",
    "mix, 20% target": TARGET + "--dr-set mean --dr-alpha 0.2",
    "top-k per layer": TARGET + "--dr-set topk --dr-fraction 0.5 --dr-blocks layer --dr-alpha 0",
    "cone (default)": TARGET,
}


def plan(out: Path, seeds: int) -> list[dict[str, Any]]:
    """The base model's run, then each arm's for each seed: its own target sentences and order."""
    base = out / "base"
    jobs = [{"name": "base", "arm": "base", "seed": 0, "steps": PRETRAIN_STEPS, "folder": str(base),
             "flags": f"{MODEL} {PRETRAIN} --save {base}"}]  # fmt: skip
    targets = (DATA / "target.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for seed in range(1, seeds + 1):
        chosen = out / f"target-{seed}.jsonl"
        chosen.write_text("".join(targets[8 * (seed - 1) : 8 * seed]), encoding="utf-8")
        for number, (arm, flags) in enumerate(ARMS.items()):
            folder = out / f"seed-{seed}-arm-{number}"
            jobs.append({"name": f"{arm}, seed {seed}", "arm": arm, "seed": seed, "steps": STEPS,
                         "folder": str(folder), "flags": f"{MODEL} {TUNE} --load {base} "
                         f"--seed {seed} {flags.format(target=chosen)}"})  # fmt: skip
    for job in jobs:
        path = Path(job["folder"]) / "metrics.jsonl"
        path.unlink(missing_ok=True)
        job["flags"] = [*job["flags"].split(), "--dr-metrics", str(path)]
    return jobs


def follow(jobs: list[Any], process: subprocess.Popen[bytes]) -> Iterator[tuple[str, int]]:
    """(name of the run under way, training steps done in all), a few times a second."""
    finished, current = 0, 0
    while True:
        alive = process.poll() is None
        while current < len(jobs):
            path = Path(jobs[current]["folder"]) / "metrics.jsonl"
            steps = len(metrics.read(path, "train")) if path.exists() else 0
            if not (Path(jobs[current]["folder"]) / "done").exists():
                break
            finished, current, steps = finished + jobs[current]["steps"], current + 1, 0
        name = jobs[min(current, len(jobs) - 1)]["name"]
        yield name, finished + (steps if current < len(jobs) else 0)
        if not alive:
            return
        time.sleep(0.5)


def train(jobs: list[dict[str, Any]], out: Path, console: Console) -> float:
    """Run the plan under a progress bar; seconds it took."""
    for job in jobs:
        (Path(job["folder"]) / "done").unlink(missing_ok=True)
    (out / "plan.json").write_text(json.dumps(jobs, indent=1))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               str(HERE / "runs.py"), str(out / "plan.json")]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    began = time.monotonic()
    with open(out / "torchrun.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(),
                   TextColumn("steps"), TimeElapsedColumn())  # fmt: skip
        try:
            with Progress(*columns, console=console) as progress:
                task = progress.add_task("starting", total=sum(job["steps"] for job in jobs))
                for name, steps in follow(jobs, process):
                    progress.update(task, description=name, completed=steps)
        finally:
            if process.poll() is None:
                process.terminate()
    if process.returncode:
        lines = [x for x in (out / "torchrun.log").read_text().splitlines() if "failed: see" in x]
        sys.exit(lines[0] if lines else f"training failed: see {out / 'torchrun.log'}")
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/sft"), help="output folder")
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3), help="runs per arm")
    options = parser.parse_args()
    out, console = options.out.resolve(), Console()
    out.mkdir(parents=True, exist_ok=True)
    jobs = plan(out, options.seeds)
    console.print(
        f"{len(jobs)} training runs through Megatron-Core's loop: 2 processes, CPU, gloo.\n"
        f"Logs, metrics and checkpoints: {out}"
    )
    seconds = train(jobs, out, console)
    results.write(jobs, out, console)
    console.print(f"Training took {seconds / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
