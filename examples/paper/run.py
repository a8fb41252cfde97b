"""The paper's settings as recipes: SFT, RLHF and RLVR of Dr. Post-Training (arXiv 2605.07063).

    python examples/paper/run.py sft --small
    python examples/paper/run.py sft --model Llama-3.2-1B --data DATA [--arms ...] [--print]

The whole form runs on one GPU: `--model` is a local Hugging Face folder, `--data` has the authors'
files. The small form runs in one CPU process, with tiny data in the same formats and a tiny model
from scratch. Both have the same flags, but for those that the recipe's file names as small. Where
the facts are from, and what differs: README.md beside this file.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent))

import prepare  # noqa: E402
import recipe  # noqa: E402
import small  # noqa: E402

from megatron_dr.compare import figures, start  # noqa: E402
from megatron_dr.compare.jobs import Job, job  # noqa: E402
from megatron_dr.compare.launch import train  # noqa: E402
from megatron_dr.compare.plan import BASE, Start  # noqa: E402

# Megatron's own layers: LoRA needs them, and neither Transformer Engine nor apex is
ON_GPU = "--bf16 --transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm"
LOAD = "--finetune --no-load-optim --no-load-rng"


def plan(options: argparse.Namespace, out: Path, console: Console) -> list[Job]:
    """The small form's base model, then each arm's run for each seed."""
    setting, found = options.setting, recipe.read(options.setting, options.small)
    arms = options.arms.split(",") if options.arms else list(found.chosen)
    for arm in arms:
        found.check(arm)
    reward = options.reward_model
    if options.small:
        taught = small.MAKE[setting](out / "data", found.data)
        begun = start.from_scratch(None, out)
        base = _base(begun, found, taught, out, options.steps)
        common, jobs = f"{begun.flags} --dr-device cpu", [base]
        reward = small.reward_model(out / "reward") if found.reward_model else None
    else:
        begun, jobs = start.from_model(options.model, out, console), []
        common = f"{begun.flags} {ON_GPU}"
    data = out / "data" if options.small else options.data
    load = out / "base" if options.small else begun.checkpoint
    tokenizer = _tokenizer(out, found, options.small)
    for seed in found.seeds[: options.seeds]:
        folder = out / f"seed-{seed}"
        files = prepare.PREPARE[setting](data, folder, found.data, tokenizer, seed)
        for arm in arms:
            own = found.flags(arm, {**files, "reward": reward}, options.steps)
            flags = f"{common} {own} --seed {seed} --load {shlex.quote(str(load))} {LOAD}"
            steps = options.steps or found.steps
            jobs.append(job(arm, seed, steps, folder / arm, flags, origin=begun.digest))
    return jobs


def _base(begun: Start, found: recipe.Recipe, taught: Path, out: Path, steps: int | None) -> Job:
    """The tiny model learns the form of its texts."""
    steps = steps or found.base_steps
    flags = (f"{begun.flags} {found.small_model} {BASE} --dr-device cpu --dr-set mean "
             f"--train-iters {steps} --lr-warmup-fraction 0.05 --eval-iters 0 --log-interval 50 "
             f"--train-data-path {shlex.quote(str(taught))} "
             f"--save {shlex.quote(str(out / 'base'))} --save-interval {steps}")  # fmt: skip
    return job("base", 0, steps, out / "base", flags, origin=begun.digest)


def _tokenizer(out: Path, found: recipe.Recipe, is_small: bool) -> Any:
    """The policy's, with the chat template that the run gives it."""
    import transformers

    folder = out / "tokenizer" if is_small else out / "model" / "hf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if found.template is not None:
        tokenizer.chat_template = found.template.read_text(encoding="utf-8")
    return tokenizer


def table(jobs: Sequence[Job], out: Path, console: Console) -> None:
    """What validation said last, by arm: mean and deviation over seeds."""
    arms: dict[str, list[Job]] = {}
    for each in jobs:
        if each.arm != "base":
            arms.setdefault(each.arm, []).append(each)
    lines = {arm: [each.lines("validation")[-1] for each in runs] for arm, runs in arms.items()}
    names = [name for name in ("lm loss", "reward")
             if all(name in line for found in lines.values() for line in found)]  # fmt: skip
    rows = [[arm, *(figures.spread([line[name] for line in found]) for name in names)]
            for arm, found in lines.items()]  # fmt: skip
    title = f"Held out, after the last step; {len(next(iter(lines.values())))} seed(s)"
    figures.table(title, ["arm", *names], rows, out / "table.md", console)


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One of the paper's settings.")
    parser.add_argument("setting", choices=recipe.SETTINGS)
    parser.add_argument("--small", action="store_true", help="tiny data and model, on the CPU")
    parser.add_argument("--model", type=Path, help="local Hugging Face folder")
    parser.add_argument("--data", type=Path, help="folder of the authors' files")
    parser.add_argument("--reward-model", type=Path, help="rlhf: its local folder")
    parser.add_argument("--arms", help="names with commas between them; by default the recipe's")
    parser.add_argument("--seeds", type=int, default=1, help="so many of the recipe's (default: 1)")
    parser.add_argument("--steps", type=int, help="in place of the recipe's, base model's too")
    parser.add_argument("--out", type=Path, help="output folder (default: runs/paper-SETTING)")
    parser.add_argument("--print", action="store_true", help="show the commands, train nothing")
    options = parser.parse_args(words)
    needed = ["model", "data"] + ["reward_model"] * (options.setting == "rlhf")
    for name in needed:
        flag, given = f"--{name.replace('_', '-')}", getattr(options, name)
        if options.small and given is not None:
            parser.error(f"--small makes its own: drop {flag}.")
        if not options.small and (given is None or not given.is_dir()):
            parser.error(f"{flag} must be a folder, or give --small.")
    for name in ("seeds", "steps"):
        number = getattr(options, name)
        if number is not None and number < 1:
            parser.error(f"--{name} must be at least 1.")
    return options


def main(words: Sequence[str] | None = None) -> int:
    options, console, began = arguments(words), Console(), time.monotonic()
    out = (options.out or Path("runs") / f"paper-{options.setting}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    try:
        jobs = plan(options, out, console)
        if options.print:
            for each in jobs:
                print(f"# {each.name}\ntorchrun --standalone --nproc-per-node 1 -m "
                      f"megatron_dr.train {shlex.join(each.flags)}")  # fmt: skip
            return 0
        console.print(f"{len(jobs)} training runs through Megatron-Core's loop; logs: {out}")
        train(jobs, out, console, ranks=1)
    except ValueError as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    table(jobs, out, console)
    console.print(f"It took {(time.monotonic() - began) / 60:.1f} minutes.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
