"""A demo's command line, its training runs under a progress bar, and where they stand.

A job is a run: {"name", "arm", "seed", "steps", "folder", "flags"}; see `runs.py`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_dr.report import metrics

Job = dict[str, Any]
HERE = Path(__file__).resolve().parent


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
    train(jobs, out, console)
    write(jobs, out, console)
    console.print(f"It took {(time.monotonic() - began) / 60:.1f} minutes.")


def train(jobs: list[Job], out: Path, console: Console) -> None:
    """Run the plan under a progress bar."""
    for job in jobs:
        for name in ("done", "metrics.jsonl"):
            (Path(job["folder"]) / name).unlink(missing_ok=True)
    (out / "plan.json").write_text(json.dumps(jobs, indent=1))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               str(HERE / "runs.py"), str(out / "plan.json")]  # fmt: skip
    # the demo's own modules, such as a reward function, are found by the runs
    paths = [str(Path(sys.argv[0]).resolve().parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                   "PYTHONPATH": os.pathsep.join(filter(None, paths))}  # fmt: skip
    with open(out / "torchrun.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(),
                   TextColumn("steps"), TimeElapsedColumn())  # fmt: skip
        try:
            with Progress(*columns, console=console) as progress:
                task = progress.add_task("starting", total=sum(job["steps"] for job in jobs))
                for name, steps in _follow(jobs, process):
                    progress.update(task, description=name, completed=steps)
        finally:
            if process.poll() is None:
                process.terminate()
    if process.returncode:
        lines = [x for x in (out / "torchrun.log").read_text().splitlines() if "failed: see" in x]
        sys.exit(lines[0] if lines else f"training failed: see {out / 'torchrun.log'}")


def _follow(jobs: list[Job], process: subprocess.Popen[bytes]) -> Iterator[tuple[str, int]]:
    """(name of the run under way, training steps done in all), a few times a second."""
    finished, current = 0, 0
    while True:
        alive = process.poll() is None
        while current < len(jobs):
            path = Path(jobs[current]["folder"]) / "metrics.jsonl"
            steps = len(metrics.read(path, "train")) if path.exists() else 0
            if not (Path(jobs[current]["folder"]) / "done").exists():
                break
            finished, current, steps = finished + jobs[current]["steps"], current + 1, 0
        name = jobs[min(current, len(jobs) - 1)]["name"]
        yield name, finished + (steps if current < len(jobs) else 0)
        if not alive:
            return
        time.sleep(0.5)


def job(name: str, seed: int, steps: int, folder: Path, flags: str) -> Job:
    """A job of the arm `name`; its metrics go to its folder."""
    return {"name": f"{name}, seed {seed}" if seed else name, "arm": name, "seed": seed,
            "steps": steps, "folder": str(folder),
            "flags": [*flags.split(), "--dr-metrics", f"{folder}/metrics.jsonl"]}  # fmt: skip
