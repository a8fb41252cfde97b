"""A job's start: here, or as a job of Slurm's, whose log is followed."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from megatron_dr.launch import queue
from megatron_dr.launch.script import Job

_ENDS = ("launch: complete", "launch: failed")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def free_port() -> int:
    """One that nobody listens on, for ranks of this machine to meet at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def here(job: Job) -> int:
    """Run the job on this machine; its exit code.

    A first Ctrl-C (or SIGTERM) has it write a checkpoint and end, a second one ends it at once.
    """
    job.write()
    # a session of its own, so that a terminal's Ctrl-C reaches us alone
    process = subprocess.Popen(["bash", str(job.out / "job.sh")], start_new_session=True)
    told = False

    def stop(*_: object) -> None:
        nonlocal told
        if told:
            _kill(process.pid)
        elif process.poll() is None:
            process.send_signal(signal.SIGUSR1)
        told = True

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            _kill(process.pid)
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill(pid: int) -> None:
    """A process and all that it has started, which torchrun puts into sessions of their own."""
    try:
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def submit(job: Job) -> str:
    """Hand the job to Slurm; its number.

    Raises:
        ValueError: there is no Slurm, or it takes no such job.
    """
    job.write()
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(job.out / "job.sh")], capture_output=True, text=True
        )
    except FileNotFoundError:
        raise ValueError("there is no sbatch on this machine: drop --slurm to run here.") from None
    if done.returncode:
        raise ValueError(f"sbatch refuses the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


def log_of(job: Job, number: str) -> Path:
    """Where a job of Slurm's writes."""
    return Path(str(job.log).replace("%j", number))


def follow(log: Path, number: str, pause: float = 1.0, quiet: float = 30.0) -> int:
    """Print a log as it grows, through requeues; the exit code by its last line.

    A log without new lines may be that of a job that was cancelled or has lost its node: Slurm is
    asked, and believed at the second time, as lines may come late and a job may be requeued.

    Args:
        number: the job's.
        pause: seconds between two looks at the log.
        quiet: seconds without new lines after which Slurm is asked, and asked again.
    """
    over, since = "", time.monotonic()
    for line in _lines(log, pause):
        print(line, end="", flush=True)
        if line.startswith(_ENDS):
            return int(line.startswith(_ENDS[1]))
        if line:
            over, since = "", time.monotonic()
        elif time.monotonic() - since >= quiet:
            before, over = over, queue.over(number)
            if before and over:
                break
            since = time.monotonic()
    print(
        f"launch: job {number} has ended, {over}, and its log does not say how far it came: the "
        "same command goes on from its last checkpoint.",
        file=sys.stderr,
    )
    return 1


def _lines(log: Path, pause: float) -> Iterator[str]:
    """As they are written, without end; an empty one before each pause, also with no log yet."""
    while not log.exists():
        yield ""
        time.sleep(pause)
    with log.open(encoding="utf-8", errors="replace") as file:
        while True:
            line = file.readline()
            yield line
            if not line:
                time.sleep(pause)
