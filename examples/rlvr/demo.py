"""The job with rewards: a small GPT learns sums from a few right prompts and many doubtful ones.

    python examples/rlvr/demo.py [--out runs/rlvr] [--seeds 3]

A base model is taught sums, not well. Then each arm goes on by GRPO with an exact-match reward:
the general prompts are many, but two fifths of their answers are wrong; the
target prompts are eight, and right. All runs go through Megatron-Core's training loop on two CPU
processes. What comes out: a table of held-out rewards and plots, in the output folder.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import arithmetic
import results
from rich.console import Console

HERE = Path(__file__).resolve().parent
SFT = HERE.parent / "sft"
BASE_STEPS, STEPS, TARGETS, WRONG = 130, 60, 8, 0.4

MODEL = f"""
    --num-layers 2 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 384
    --seq-length 16 --max-position-embeddings 16 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --hidden-dropout 0 --attention-dropout 0 --make-vocab-size-divisible-by 8
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model {SFT / "tokenizer"}
    --use-distributed-optimizer --adam-beta2 0.95 --weight-decay 0 --log-interval 10
    --dr-device cpu
"""
BASE = f"""
    --micro-batch-size 64 --global-batch-size 128 --train-iters {BASE_STEPS} --lr 2e-3
    --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-iters 20 --seed 1 --eval-iters 0
    --eval-interval 1000
    --save-interval {BASE_STEPS}
"""
GRPO = f"""
    --micro-batch-size 8 --global-batch-size 128 --train-iters {STEPS} --lr 1e-4
    --lr-decay-style constant --lr-warmup-iters 5 --eval-interval 10
    --finetune --no-load-optim --no-load-rng
    --dr-rl-algorithm grpo --dr-rl-reward megatron_dr.rl.rewards:exact_match --dr-rl-prompts 16
    --dr-rl-group 8 --dr-rl-max-tokens 4 --dr-rl-kl 0.01 --dr-rl-target-prompts {TARGETS}
"""
# name in the table -> flags; an arm without --dr-target-data never sees the target
TARGET = "--dr-target-data {target} --dr-target-batch-size 64 "
ARMS = {
    "general only": "--dr-set mean",
    "target only": TARGET + "--dr-set target",
    "filter, per sample (default)": TARGET + "--dr-rows sample",
}


def plan(out: Path, seeds: int) -> list[dict[str, Any]]:
    """The base model's run, then each arm's for each seed: its own prompts and draws."""
    pairs = arithmetic.sums(0)
    held_out, pool = pairs[:100], pairs[100:]
    arithmetic.write(out / "held_out.jsonl", arithmetic.examples(held_out, 0.0, 1))
    taught = [
        {"prompt": line["prompt"], "response": line["answer"]}
        for line in arithmetic.examples(pool, 0.0, 2)
    ]
    arithmetic.write(out / "base.jsonl", taught)
    base = out / "base"
    jobs = [{"name": "base", "arm": "base", "seed": 0, "folder": str(base), "flags":
             f"{MODEL} {BASE} --save {base} --train-data-path {out / 'base.jsonl'}"}]  # fmt: skip
    for seed in range(1, seeds + 1):
        own = arithmetic.sums(seed)
        own = [pair for pair in own if pair in set(pool)]
        target, general = out / f"target-{seed}.jsonl", out / f"general-{seed}.jsonl"
        arithmetic.write(target, arithmetic.examples(own[:TARGETS], 0.0, seed))
        arithmetic.write(general, arithmetic.examples(own[TARGETS:], WRONG, seed))
        lies = out / f"lies-{seed}.jsonl"
        arithmetic.write(lies, arithmetic.examples(held_out, WRONG, seed))
        for number, (arm, flags) in enumerate(ARMS.items()):
            folder = out / f"seed-{seed}-arm-{number}"
            jobs.append({"name": f"{arm}, seed {seed}", "arm": arm, "seed": seed,
                         "folder": str(folder), "flags": f"{MODEL} {GRPO} --load {base} "
                         f"--seed {seed} --data-path {general} --dr-rl-valid-data {lies} "
                         f"--dr-target-valid-data {out / 'held_out.jsonl'} "
                         f"{flags.format(target=target)}"})  # fmt: skip
    for job in jobs:
        path = Path(job["folder"]) / "metrics.jsonl"
        path.unlink(missing_ok=True)
        job["flags"] = [*job["flags"].split(), "--dr-metrics", str(path)]
    return jobs


def train(jobs: list[dict[str, Any]], out: Path, console: Console) -> float:
    """Run the plan; seconds it took."""
    for job in jobs:
        (Path(job["folder"]) / "done").unlink(missing_ok=True)
    (out / "plan.json").write_text(json.dumps(jobs, indent=1))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               str(SFT / "runs.py"), str(out / "plan.json")]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    began = time.monotonic()
    with open(out / "torchrun.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            with console.status("starting") as status:
                while process.poll() is None:
                    left = [j for j in jobs if not (Path(j["folder"]) / "done").exists()]
                    if left:
                        status.update(f"{len(jobs) - len(left)} of {len(jobs)} runs done; "
                                      f"under way: {left[0]['name']}")  # fmt: skip
                    time.sleep(0.5)
        finally:
            if process.poll() is None:
                process.terminate()
    if process.returncode:
        lines = [x for x in (out / "torchrun.log").read_text().splitlines() if "failed: see" in x]
        sys.exit(lines[0] if lines else f"training failed: see {out / 'torchrun.log'}")
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/rlvr"), help="output folder")
    parser.add_argument("--seeds", type=int, default=3, help="runs per arm")
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
