"""The job with a reward model: a small GPT learns to write reviews; its raters like them too long.

    python examples/rlhf/demo.py [--out runs/rlhf] [--seeds 3]

A base model is taught reviews of all sorts. A reward model is trained on the choices of raters who
know which praise fits, but who also prefer long reviews. Then each arm goes on by PPO. The general
prompts are many and scored by the reward model; the eight target prompts are scored by a trusted
function that wants one fitting word of praise. All runs of the policy go through Megatron-Core's
training loop on two CPU processes. What comes out: a table of held-out rewards and plots, in the
output folder.
"""

import random
import sys
from pathlib import Path

from megatron_dr.compare import demo
from megatron_dr.compare.jobs import Job, job

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "rlvr"))

import raters  # noqa: E402
import reviews  # noqa: E402
import rewards  # noqa: E402

BASE_STEPS, STEPS, TARGETS, HELD_OUT = 300, 40, 8, 24
TOKENIZER = HERE.parent / "sft" / "tokenizer"

MODEL = f"""
    --num-layers 2 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 384
    --seq-length 56 --max-position-embeddings 56 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --hidden-dropout 0 --attention-dropout 0 --make-vocab-size-divisible-by 8
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model {TOKENIZER}
    --use-distributed-optimizer --adam-beta2 0.95 --weight-decay 0 --log-interval 10
    --dr-device cpu --global-batch-size 128 --micro-batch-size 32
"""
BASE = f"""
    --train-iters {BASE_STEPS} --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-iters 20
    --seed 1 --save-interval {BASE_STEPS} --global-batch-size 64
"""
PPO = f"""
    --train-iters {STEPS} --lr 2e-4 --lr-decay-style constant --lr-warmup-iters 5 --eval-interval 5
    --finetune --no-load-optim --no-load-rng
    --dr-rl-algorithm ppo --dr-rl-prompts 32 --dr-rl-group 4 --dr-rl-epochs 2
    --dr-rl-max-tokens 38 --dr-rl-kl 0.02 --dr-rl-target-prompts {2 * TARGETS}
    --dr-rl-target-reward reviews:trusted
"""
# name in the table -> flags; an arm without --dr-target-data never sees the target
TARGET = "--dr-target-data {target} --dr-target-batch-size 64 "
ARMS = {
    "general only": "--dr-set mean",
    "target only": TARGET + "--dr-set target",
    "mix, 20% target": TARGET + "--dr-set mean --dr-alpha 0.2",
    "filter, per sample (default)": TARGET + "--dr-rows sample",
    "top half, per sample": TARGET + "--dr-rows sample --dr-set topk --dr-fraction 0.5 "
    "--dr-alpha 0",
}


def plan(out: Path, seeds: int) -> list[Job]:
    """The base model's run, then each arm's for each seed: its own target prompts and draws."""
    nouns = reviews.nouns(0)
    held_out, pool = nouns[:HELD_OUT], nouns[HELD_OUT:]
    agreement = raters.train(nouns, TOKENIZER, out / "raters")
    print(f"The reward model ranks {agreement:.0%} of fresh pairs as the raters do.")
    valid = reviews.write(out / "held_out.jsonl", [reviews.prompt(noun) for noun in held_out])
    chance = random.Random(1)
    taught = [{"prompt": reviews.prompt(noun)["prompt"],
               "response": reviews.completion(noun[1], chance)} for noun in nouns * 30]  # fmt: skip
    data, base = reviews.write(out / "base.jsonl", taught), out / "base"
    flags = f"{MODEL} {BASE} --save {base} --train-data-path {data}"
    jobs = [job("base", 0, BASE_STEPS, base, flags)]
    for seed in range(2, seeds + 2):  # task and learning rate were chosen on seed 1
        own = [noun for noun in reviews.nouns(seed) if noun in pool]
        lines = [reviews.prompt(noun) for noun in own]
        target = reviews.write(out / f"target-{seed}.jsonl", lines[:TARGETS])
        general = reviews.write(out / f"general-{seed}.jsonl", lines[TARGETS:])
        for number, (arm, more) in enumerate(ARMS.items()):
            flags = (f"{MODEL} {PPO} --load {base} --seed {seed} --data-path {general} "
                     f"--dr-rl-reward-model {out / 'raters'} --dr-rl-valid-data {valid} "
                     f"--dr-target-valid-data {valid} {more.format(target=target)}")  # fmt: skip
            jobs.append(job(arm, seed, STEPS, out / f"seed-{seed}-arm-{number}", flags))
    return jobs


if __name__ == "__main__":
    demo.demo(__doc__, "rlhf", plan, rewards.write)
