"""Training runs under a progress bar, several side by side where there is room."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_dr.compare.jobs import Job, write

Process = subprocess.Popen[bytes]


def train(
    jobs: Sequence[Job], out: Path, console: Console, ranks: int = 2, beside: int = 1
) -> None:
    """Run all of the jobs anew, in their order.

    Args:
        ranks: processes of a run.
        beside: runs at a time.

    Raises:
        ValueError: a run failed: which, and where its log is.
    """
    for job in jobs:
        shutil.rmtree(job.folder, ignore_errors=True)
    write(jobs, out / "plan.json")
    logs = [out / f"torchrun.{number}.log" for number in range(beside)]
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(),
               TextColumn("steps"), TimeElapsedColumn())  # fmt: skip
    with contextlib.ExitStack() as stack:
        workers = [_start(out / "plan.json", logs, number, ranks) for number in range(beside)]
        stack.callback(_stop, workers)
        progress = stack.enter_context(Progress(*columns, console=console))
        task = progress.add_task("starting", total=sum(job.steps for job in jobs))
        for name, steps in _follow(jobs, workers):
            progress.update(task, description=name, completed=steps)
    if any(worker.returncode for worker in workers):
        lines = [x for log in logs for x in log.read_text().splitlines() if "failed: see" in x]
        raise ValueError(lines[0] if lines else f"training failed: see {logs[0]}")


def _start(plan: Path, logs: Sequence[Path], number: int, ranks: int) -> Process:
    """A `torchrun` that shares the plan with the others."""
    module = ["-m", "megatron_dr.mcore.loop.runs", str(plan)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={ranks}", *module]  # fmt: skip
    # the modules of who calls, such as a reward function, are found by the runs
    paths = [str(Path(sys.argv[0]).resolve().parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                   "PYTHONPATH": os.pathsep.join(filter(None, paths))}  # fmt: skip
    if len(logs) > 1 and (gpus := visible_gpus()):
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[number * ranks :][:ranks])
    with open(logs[number], "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


def _stop(workers: Sequence[Process]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    for worker in workers:
        worker.wait()


def _follow(jobs: Sequence[Job], workers: Sequence[Process]) -> Iterator[tuple[str, int]]:
    """(the runs under way, training steps done in all), a few times a second.

    Ends with the workers, or with the first that failed.
    """
    left, finished, name = list(jobs), 0, jobs[0].name
    while True:
        codes = [worker.poll() for worker in workers]
        finished += sum(job.steps for job in left if job.done)
        left = [job for job in left if not job.done]
        running = [job for job in left if (job.folder / "taken").exists()]
        name = ", ".join(job.name for job in running) or name
        yield name, finished + sum(len(job.lines("train")) for job in running)
        if any(codes) or None not in codes:
            return
        time.sleep(0.5)
