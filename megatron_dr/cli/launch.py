"""Train a model by a recipe, here or on Slurm; docs/cluster.md.

    megatron-dr launch MODEL/METHOD[/SIZE] hf=FOLDER data=FILE target=FILE [key=value ...]
    megatron-dr launch llama-3.1-8b/lora hf=Llama-3.1-8B data=g.jsonl target=t.jsonl --dry-run

It prints the plan (docs/plan.md), refuses what does not fit, writes the run's scripts into its
folder, and starts them: the conversion from Hugging Face, training, and the conversion back. The
same command goes on with a run that was stopped. The recipes are those of examples/cluster.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_dr.cli.main import parser_of
from megatron_dr.launch.recipe import Recipe, read_recipe

_HERE = Path(__file__).parents[2] / "examples" / "cluster"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("launch", __doc__)
    parser.add_argument("recipe", metavar="MODEL/METHOD[/SIZE]")
    parser.add_argument("given", metavar="key=value", nargs="*", help="over what the recipe says, "
                        "such as out=FOLDER, layout.tp=4, flags.lr=1e-5, dr.set=span")  # fmt: skip
    parser.add_argument("--recipes", type=Path, default=_HERE, metavar="DIR",
                        help="their folder (default: examples/cluster of the clone)")  # fmt: skip
    parser.add_argument("--slurm", action="store_true", help="as a job of Slurm's")
    parser.add_argument("--dry-run", action="store_true", help="show the scripts, start nothing")
    parser.add_argument("--show-logs", action="store_true", help="of a job of Slurm's, follow it")
    parser.add_argument("--force", action="store_true", help="start what the plan says won't fit")
    found = parser.parse_intermixed_args(argv)
    if found.show_logs and not found.slurm:
        parser.error("--show-logs is of --slurm: a run on this machine shows its own.")
    return found


def run(args: argparse.Namespace) -> int:
    """The exit code: of the run; 1 where it does not fit or fails."""
    from rich.console import Console

    from megatron_dr.cli import launch_plan, plan_tables
    from megatron_dr.launch import files, script, start

    recipe = read_recipe(args.recipes, args.recipe, args.given)
    job = script.job(recipe, _out(recipe), args.slurm, start.free_port())
    # what is mounted may have another name here
    if not (args.dry_run or args.slurm and recipe.value("slurm", "mounts")):
        files.check(recipe, job.out / "base" / "latest_checkpointed_iteration.txt")
    numbers = launch_plan.numbers(recipe, job)
    plan_tables.show(numbers, Console(stderr=True))
    if args.dry_run:
        for name, text in job.files.items():
            print(f"# -- {job.out / name}\n{text}")
        return int(bool(numbers["refusal"]))
    if numbers["refusal"] and not args.force:
        print("launch: it does not fit; --force starts it all the same.", file=sys.stderr)
        return 1
    if not args.slurm:
        return start.here(job)
    number = start.submit(job)
    log = start.log_of(job, number)
    print(f"job {number}; its log: {log}", flush=True)
    return start.follow(log, number) if args.show_logs else 0


def _out(recipe: Recipe) -> Path:
    name = recipe.text("out") or f"runs/{recipe.name.replace('/', '-')}"
    return Path(name).absolute()


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 2 for what can't be started, in one sentence."""
    import warnings

    warnings.filterwarnings("ignore")
    args = arguments(argv)
    try:
        return run(args)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"launch: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # of following a log: the job goes on
        return 130
