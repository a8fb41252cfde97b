"""Where the general prompts are."""

from argparse import Namespace

from megatron_dr.data.records import SUFFIXES
from megatron_dr.mcore.data.samples import is_file


def prompt_files(args: Namespace) -> list[str]:
    """The files of general prompts.

    Raises:
        ValueError: none, or something else.
    """
    paths: list[str] = args.data_path or []
    if not paths:
        raise ValueError("--dr-rl-algorithm needs general prompts: give --data-path prompts.jsonl.")
    for path in paths:
        if not is_file(path):
            raise ValueError(
                f"--data-path {path}: with --dr-rl-algorithm prompts are files that end in "
                f"{', '.join(SUFFIXES)}, or folders of them, without weights between them."
            )
    return paths
