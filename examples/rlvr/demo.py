"""The job with rewards: a small GPT learns sums whose answers most graders want otherwise.

    python examples/rlvr/demo.py [--out runs/rlvr] [--seeds 3]

A base model is taught sums, not well, with answers written in two ways: 19 and +19. Then each arm
goes on by GRPO with an exact-match reward. The general prompts are many, and six tenths of them
want the sign; the eight target prompts, which are trusted, don't. What the model sees of a prompt
doesn't say. All runs go through Megatron-Core's training loop on two CPU processes. What comes out:
a table of held-out rewards and plots, in the output folder.
"""

from pathlib import Path

import arithmetic
import rewards

from megatron_dr.compare import demo
from megatron_dr.compare.jobs import Job, job

HERE = Path(__file__).resolve().parent
BASE_STEPS, STEPS, TARGETS, HELD_OUT, SIGNED = 300, 60, 8, 100, 0.6

MODEL = f"""
    --num-layers 2 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 384
    --seq-length 12 --max-position-embeddings 12 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --hidden-dropout 0 --attention-dropout 0 --make-vocab-size-divisible-by 8
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model {HERE.parent / "sft" / "tokenizer"}
    --use-distributed-optimizer --adam-beta2 0.95 --weight-decay 0 --log-interval 10
    --dr-device cpu --global-batch-size 128 --micro-batch-size 32
"""
BASE = f"""
    --train-iters {BASE_STEPS} --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-iters 20
    --seed 1 --save-interval {BASE_STEPS}
"""
GRPO = f"""
    --train-iters {STEPS} --lr 1e-4 --lr-decay-style constant --lr-warmup-iters 5 --eval-interval 5
    --finetune --no-load-optim --no-load-rng
    --dr-rl-algorithm grpo --dr-rl-reward megatron_dr.rl.rewards:exact_match --dr-rl-prompts 64
    --dr-rl-group 8 --dr-rl-max-tokens 4 --dr-rl-kl 0.01 --dr-rl-target-prompts {4 * TARGETS}
"""
# name in the table -> flags; an arm without --dr-target-data never sees the target
TARGET = "--dr-target-data {target} --dr-target-batch-size 64 "
ARMS = {
    "general only": "--dr-set mean",
    "target only": TARGET + "--dr-set target",
    "mix, 20% target": TARGET + "--dr-set mean --dr-alpha 0.2",
    "filter once a rollout (IIF)": "--dr-target-data {target} --dr-rl-filter once",
    "filter, per sample (default)": TARGET + "--dr-rows sample",
    "top half, per sample": TARGET + "--dr-rows sample --dr-set topk --dr-fraction 0.5 "
    "--dr-alpha 0",
}


def plan(out: Path, seeds: int) -> list[Job]:
    """The base model's run, then each arm's for each seed: its own prompts and draws."""
    pairs = arithmetic.sums(0)
    held_out, pool = pairs[:HELD_OUT], pairs[HELD_OUT:]
    trusted = arithmetic.write(out / "trusted.jsonl", arithmetic.examples(held_out, 0, 0))
    doubtful = arithmetic.write(out / "doubtful.jsonl", arithmetic.examples(held_out, SIGNED, 0))
    lines = [x for n in range(8) for x in arithmetic.examples(pool, 0.5, n, wrong=0.4)]
    taught = [{"prompt": line["prompt"], "response": line["answer"]} for line in lines]
    data, base = arithmetic.write(out / "base.jsonl", taught), out / "base"
    flags = f"{MODEL} {BASE} --save {base} --train-data-path {data}"
    jobs = [job("base", 0, BASE_STEPS, base, flags)]
    for seed in range(2, seeds + 2):  # task and learning rate were chosen on seed 1
        own = [pair for pair in arithmetic.sums(seed) if pair in set(pool)]
        lines = arithmetic.examples(own[:TARGETS], 0, seed)
        target = arithmetic.write(out / f"target-{seed}.jsonl", lines)
        lines = arithmetic.examples(own[TARGETS:], SIGNED, seed)
        general = arithmetic.write(out / f"general-{seed}.jsonl", lines)
        for number, (arm, more) in enumerate(ARMS.items()):
            flags = (f"{MODEL} {GRPO} --load {base} --seed {seed} --data-path {general} "
                     f"--dr-rl-valid-data {doubtful} --dr-target-valid-data {trusted} "
                     f"{more.format(target=target)}")  # fmt: skip
            folder = out / f"seed-{seed}-arm-{number}"
            jobs.append(job(arm, seed, STEPS, folder, flags))
    return jobs


if __name__ == "__main__":
    demo.demo(__doc__, "rlvr", plan, rewards.write)
