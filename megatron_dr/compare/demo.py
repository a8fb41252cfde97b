"""The command line of a demo: a fixed plan of training runs on two CPU processes."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from megatron_dr.compare.jobs import Job
from megatron_dr.compare.launch import train


def demo(
    description: str,
    folder: str,
    plan: Callable[[Path, int], list[Job]],
    write: Callable[[list[Job], Path, Console], None],
) -> None:
    """The whole of a demo: its flags, the runs of its plan(out, seeds), and what it writes."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs") / folder, help="output folder")
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3), help="runs per arm")
    options = parser.parse_args()
    out, console = options.out.resolve(), Console()
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    jobs = plan(out, options.seeds)
    console.print(
        f"{len(jobs)} training runs through Megatron-Core's loop: 2 processes, CPU, gloo.\n"
        f"Logs, metrics and checkpoints: {out}"
    )
    try:
        train(jobs, out, console)
    except ValueError as error:
        sys.exit(str(error))
    write(jobs, out, console)
    console.print(f"It took {(time.monotonic() - began) / 60:.1f} minutes.")
