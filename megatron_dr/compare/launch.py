"""Training runs under a progress bar, several side by side where there is room."""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_dr.compare.jobs import Job, write

Process = subprocess.Popen[bytes]


class Stopped(KeyboardInterrupt):
    """A signal that ends us as Ctrl-C does: the runs that were started end, too."""

    def __init__(self, number: int) -> None:
        self.code = 128 + number


def train(
    jobs: Sequence[Job], out: Path, console: Console, ranks: int = 2, beside: int = 1,
    stop: bool = True,
) -> None:  # fmt: skip
    """Run all of the jobs anew, in their order.

    Args:
        ranks: processes of a run.
        beside: runs at a time.
        stop: with the first run that fails; otherwise the others go on, and a job has its
            `failure`, but for one that another needs.

    Raises:
        ValueError: a run failed: which, why, and where its log is.
    """
    for job in jobs:
        shutil.rmtree(job.folder, ignore_errors=True)
    write(jobs, out / "plan.json")
    logs = [out / f"torchrun.{number}.log" for number in range(beside)]
    for log in logs:
        log.unlink(missing_ok=True)
    needed = {job.after for job in jobs}
    fatal = [job for job in jobs if stop or job.folder in needed]
    start = functools.partial(_start, out / "plan.json", logs, ranks)
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(),
               TextColumn("steps"), TimeElapsedColumn())  # fmt: skip
    workers: dict[int, Process] = {}
    with _signals_stop(), contextlib.ExitStack() as stack:
        stack.callback(_stop, workers)
        for number in range(beside):
            workers[number] = start(number)
        progress = stack.enter_context(Progress(*columns, console=console))
        task = progress.add_task("starting", total=sum(job.steps for job in jobs))
        for name, steps in _follow(jobs, workers, start, fatal):
            progress.update(task, description=name, completed=steps)
    for job in fatal:
        if job.failure is not None:
            raise ValueError(f"run {job.name!r} failed: {job.failure}")
    if not all(job.done or job.failure for job in jobs):
        raise ValueError(f"training failed: see {', '.join(map(str, logs))}")


@contextlib.contextmanager
def _signals_stop() -> Iterator[None]:
    """While runs are under way SIGTERM and a lost terminal raise `Stopped`, once."""

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise Stopped(number)

    known = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    caught = [number for number, handler in known.items() if handler is not signal.SIG_IGN]  # nohup
    for number in caught:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, known[number])


def _start(plan: Path, logs: Sequence[Path], ranks: int, number: int) -> Process:
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
    with open(logs[number], "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


def _stop(workers: Mapping[int, Process]) -> None:
    for worker in workers.values():
        if worker.poll() is None:
            worker.terminate()  # torchrun ends its ranks, each with the run that it has forked
    for worker in workers.values():
        worker.wait()


def _follow(
    jobs: Sequence[Job], workers: dict[int, Process], start: Callable[[int], Process],
    fatal: Sequence[Job],
) -> Iterator[tuple[str, int]]:  # fmt: skip
    """(the runs under way, training steps done in all), a few times a second.

    A worker that ended with a run that failed is started again while there are runs to take. Ends
    with the workers, with a run that is `fatal` and failed, or with a worker that no run explains.
    """
    left, finished, name, unexplained = list(jobs), 0, jobs[0].name, 0
    while True:
        codes = {number: worker.poll() for number, worker in workers.items()}
        over = [job for job in left if job.done or job.failure]
        left = [job for job in left if job not in over]
        finished += sum(job.steps for job in over)
        running = [job for job in left if (job.folder / "taken").exists()]
        name = ", ".join(job.name for job in running) or name
        yield name, finished + sum(len(job.lines("train")) for job in running)
        unexplained -= sum(job.failure is not None for job in over)
        for number in [number for number, code in codes.items() if code]:
            unexplained += 1
            del workers[number]
            if len(left) > len(running):
                workers[number], codes[number] = start(number), None
        failed = any(job in fatal for job in over if job.failure)
        if None not in codes.values() or unexplained > 0 or failed:
            return
        time.sleep(0.5)
