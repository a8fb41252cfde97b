"""The main job: a small GPT is taught Spanish from 8 sentences, beside a pool that hides some.

    python examples/sft/demo.py [--out runs/sft] [--seeds 3]

A base model is trained on English, German, Tagalog, Russian and Italian. Then each arm fine-tunes
it with 8 Spanish target sentences and a general pool of which a tenth is Spanish, unlabelled. All
runs go through Megatron-Core's training loop on two CPU processes. What comes out: a
table of held-out losses (nats per byte) and plots, in the output folder.
"""

from pathlib import Path

import results

from megatron_dr.compare import demo
from megatron_dr.compare.jobs import Job, job

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
    "cone, alpha 0.05": TARGET + "--dr-alpha 0.05",
    "cone, auto (default)": TARGET,
}


def plan(out: Path, seeds: int) -> list[Job]:
    """The base model's run, then each arm's for each seed: its own target sentences and order."""
    base = out / "base"
    flags = f"{MODEL} {PRETRAIN} --save {base}"
    jobs = [job("base", 0, PRETRAIN_STEPS, base, flags)]
    targets = (DATA / "target.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for seed in range(1, seeds + 1):
        chosen = out / f"target-{seed}.jsonl"
        chosen.write_text("".join(targets[8 * (seed - 1) : 8 * seed]), encoding="utf-8")
        for number, (arm, own) in enumerate(ARMS.items()):
            flags = f"{MODEL} {TUNE} --load {base} --seed {seed} {own.format(target=chosen)}"
            folder = out / f"seed-{seed}-arm-{number}"
            jobs.append(job(arm, seed, STEPS, folder, flags))
    return jobs


if __name__ == "__main__":
    demo.demo(__doc__, "sft", plan, results.write)
