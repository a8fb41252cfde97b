"""What a run will need before it starts: memory, bytes, seconds; docs/plan.md.

    megatron-dr plan --gpus 64 [--hardware h100] [--hf-config DIR] <the flags of the run>
    megatron-dr plan --gpus 64 --hf-config DIR --sweep <the flags of the run>

The flags are those of megatron_dr.train, Megatron's and the plugin's, read by Megatron's own parser
and checks; no GPU, no data and no checkpoint is needed. Exit code 1: it does not fit.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_dr.cli import plan_tables
from megatron_dr.cli.main import parser_of
from megatron_dr.plan import hardware as hardware_
from megatron_dr.plan.asked import Asked, settle
from megatron_dr.plan.hardware import Hardware
from megatron_dr.plan.report import proposed, report
from megatron_dr.plan.sweep import proposals

FLAGS: dict[str, dict[str, Any]] = {
    "--gpus": {"type": int, "required": True, "help": "of the run, over all nodes"},
    "--hardware": {"default": "h100", "metavar": "NAME|FILE",
                   "help": f"{', '.join(hardware_.KNOWN)}, or a YAML file of bandwidths, latencies "
                   "and memory (default: h100)"},
    "--hf-config": {"type": Path, "metavar": "DIR",
                    "help": "folder of a Hugging Face config.json, in place of the model's flags"},
    "--sample-length": {"type": float, "metavar": "TOKENS",
                        "help": "mean length of the samples that are packed in a sequence "
                        "(default: one fills it)"},
    "--sweep": {"action": "store_true",
                "help": "propose layouts for these GPUs, the fastest first; the flags' own sizes "
                "of TP, PP, CP, EP, recompute and microbatch do not count"},
    "--json": {"action": "store_true", "help": "print numbers in place of tables"},
    "--html": {"type": Path, "metavar": "FILE",
               "help": "write a page with pictures, too; not with --sweep"},
}  # fmt: skip


def arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and the flags of the run."""
    parser = parser_of("plan", __doc__)
    parser.allow_abbrev = False  # a run's flag may begin as ours
    for flag, options in FLAGS.items():
        parser.add_argument(flag, **options)
    args, more = parser.parse_known_args(argv)
    if args.gpus < 1:
        raise ValueError(f"--gpus must be at least 1, not {args.gpus}.")
    if args.sweep and args.html:
        raise ValueError(
            "--html is a page of one layout, which --sweep has none of: give it without --sweep, "
            "with the flags of a layout that --sweep proposed."
        )
    length = args.sample_length
    if length is not None and not 0 < length < math.inf:
        raise ValueError(f"--sample-length must be a number of tokens above 0, not {length:g}.")
    return args, more


def hardware_of(name: str) -> Hardware:
    """Hardware of a name, or of a file.

    Raises:
        ValueError: neither, or a file that says something else.
    """
    if name.lower() in hardware_.KNOWN:
        return hardware_.KNOWN[name.lower()]
    path = Path(name)
    if not path.is_file():
        known = ", ".join(hardware_.KNOWN)
        raise ValueError(f"--hardware {name}: neither one of {known} nor a file.")
    import yaml

    try:
        return hardware_.parse(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())}).") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply.") from None
    except (ValueError, LookupError) as error:  # of a tag that its value does not go with
        raise ValueError(f"{path}: {error}") from None


def model_flags(folder: Path) -> list[str]:
    """The model's flags of a Hugging Face config.json."""
    import shlex

    from megatron_dr.hf.config import command_line, megatron_arguments, read_model

    model = read_model(folder.parent if folder.name == "config.json" else folder)
    words: dict[str, Any] = megatron_arguments(model, model.vocabulary)
    del words["padded_vocab_size"]
    flags = shlex.split(command_line(words))
    return [*flags, "--position-embedding-type", "rope", "--vocab-size", str(model.vocabulary)]


def asked(args: argparse.Namespace, more: list[str]) -> Asked:
    """What the flags ask for.

    Raises:
        ValueError: flags that the run would refuse, or that the plan does not know.
    """
    import dataclasses

    from megatron_dr.mcore import cpu

    cpu.enable()  # before Megatron is imported
    from megatron_dr.mcore.loop import plan_flags

    flags = [*(model_flags(args.hf_config) if args.hf_config else []), *more]
    found = plan_flags.read(flags, args.gpus, one_rank=args.sweep)
    if args.sample_length is None:
        return found
    length = found.kept.shape.length
    if args.sample_length > length:
        raise ValueError(
            f"--sample-length {args.sample_length:g} is more than --seq-length {length}: samples "
            "are packed in a sequence, so give a mean of at most that."
        )
    return dataclasses.replace(found, sample=args.sample_length)


def run(args: argparse.Namespace, more: list[str]) -> int:
    """The exit code: 1 where it does not fit."""
    hardware = hardware_of(args.hardware)
    wanted = asked(args, more)
    console = Console()
    if args.sweep:
        found = proposals(wanted, args.gpus, hardware)
        if args.json:
            print(json.dumps([proposed(one) for one in found], indent=1))
        else:
            plan_tables.proposals(found, console)
        return int(not found)
    planned, said = settle(wanted, hardware)
    numbers = report(planned, hardware, said)
    if args.json:
        print(json.dumps(numbers, indent=1))
    else:
        plan_tables.show(numbers, console)
    if args.html:
        from megatron_dr.cli import plan_page

        plan_page.write(numbers, args.html)
        print(f"{args.html}: written", file=sys.stderr)
    return int(bool(numbers["refusal"]))


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 1 where it does not fit, 2 for what can't be planned, in one sentence."""
    import warnings

    warnings.filterwarnings("ignore")
    try:
        args, more = arguments(argv)
        return run(args, more)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"plan: error: {error}", file=sys.stderr)
        return 2
