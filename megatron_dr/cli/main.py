"""The table of sub-commands, and the parser that each of them begins with."""

import argparse
import pkgutil
import sys
from collections.abc import Sequence

# Each is `main` of the module of its name, imported when it is called: doctor runs without torch.
COMMANDS = {
    "doctor": "what is installed and works, and what mends the rest",
    "convert": "checkpoints from Hugging Face to Megatron and back",
    "verify": "compare a checkpoint of Megatron with one of Hugging Face",
    "prepare": "tokenise data for training, with loss masks",
    "plan": "memory, bytes and seconds of a run, before it starts",
    "report": "a page of what a run did: curves, weights, time, flags",
    "watch": "a run that is going, in the terminal",
    "gpu-check": "what one GPU says: gradients, waits, time, memory",
    "launch": "train by a recipe, here or on Slurm, from Hugging Face and back",
    "compare": "compare mixes and projections on data of your own",
    "weights": "what a run's record of weights says: of corpora, samples, layers",
}


def parser_of(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A sub-command's parser; doc: its module's docstring, printed as it stands."""
    return argparse.ArgumentParser(
        f"megatron-dr {name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the arguments after the sub-command's name to it; its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser("megatron-dr", description="What goes with megatron_dr.train.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in COMMANDS.items():
        commands.add_parser(name, help=what, add_help=False)
    name = parser.parse_args(words[:1]).command
    try:
        command = pkgutil.resolve_name(f"megatron_dr.cli.{name.replace('-', '_')}:main")
    except ModuleNotFoundError as error:
        sys.exit(f"megatron-dr {name}: {error}: see megatron-dr doctor.")
    return int(command(words[1:]))
