"""A job's start: here, or as a job of Slurm's, whose log is followed."""

import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil

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


def follow(log: Path, pause: float = 1.0) -> int:
    """Print a log as it grows, through requeues; the exit code by its last line."""
    while not log.exists():
        time.sleep(pause)
    with log.open(encoding="utf-8", errors="replace") as file:
        while True:
            line = file.readline()
            if not line:
                time.sleep(pause)
                continue
            print(line, end="", flush=True)
            if line.startswith(_ENDS):
                return int(line.startswith(_ENDS[1]))
