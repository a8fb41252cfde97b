"""Several training runs in one `torchrun`: Megatron is imported once, each run is a fork.

    torchrun --nproc-per-node 2 -m megatron_dr.mcore.loop.runs PLAN.json

PLAN is a list of `megatron_dr.compare.jobs.Job` as JSON. A run is `python -m megatron_dr.train
<flags>` on every rank; its output goes to <folder>/log.<rank>.txt. Several such processes may share
a plan: each takes the first run that no other has taken. What failed says why in <folder>/failed;
the next run follows, but where a run has several ranks, which can't be told to leave it: then this
process ends.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from megatron_dr.mcore import cpu
from megatron_dr.mcore.loop import train, writers

_LONG = timedelta(days=30)  # a rank waits while rank 0 waits for the run that another needs


def run(number: int, folder: Path, flags: list[str]) -> tuple[int, int]:
    """(exit code, peak memory [bytes]) of one run, in a child process that has our imports."""
    pid = os.fork()
    if pid:
        _, status, used = os.wait4(pid, 0)
        return os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024
    code, inherited = 1, set(multiprocessing.active_children())
    try:
        writers.in_fork()
        store = PrefixStore(f"run {number}", _store())
        with open(folder / f"log.{os.environ['RANK']}.txt", "w", buffering=1) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sys.argv = ["megatron_dr.train", *flags]
            train.main(store)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for child in set(multiprocessing.active_children()) - inherited:
            child.terminate()  # Megatron's checkpoint writers
        sys.stdout.flush()
        os._exit(code)


def _store(wait: timedelta = timedelta(minutes=5)) -> TCPStore:
    """torchrun's, in which its ranks meet."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=wait)


def _taken(plan: list[dict[str, Any]], is_first: bool) -> Iterator[int]:
    """Numbers of the runs that this process takes; rank 0 takes them and tells the others."""
    store = _store(_LONG)
    mine = _free(plan) if is_first else iter(())
    for turn in range(len(plan) + 1):
        if is_first:
            store.set(f"turn {turn}", str(next(mine, -1)))
        number = int(store.get(f"turn {turn}"))
        if number < 0:
            return
        yield number


def _free(plan: list[dict[str, Any]]) -> Iterator[int]:
    """Take one run after another; one that needs another's checkpoint, when that is done."""
    for number, job in enumerate(plan):
        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        try:
            (folder / "taken").touch(exist_ok=False)
        except FileExistsError:
            continue
        while job["after"] and not (Path(job["after"]) / "done").exists():
            time.sleep(0.2)  # for ever where it fails: then the launcher ends us
        yield number


def _note_failure(folder: Path, code: int) -> None:
    """The last line of its log; of several ranks it is the first to fail that says it."""
    path = folder / f"log.{os.environ['RANK']}.txt"
    said = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    last = next((line.strip() for line in reversed(said) if line.strip()), "")
    if code < 0:
        last = f"ended by {signal.Signals(-code).name}"
    with contextlib.suppress(FileExistsError), open(folder / "failed", "x") as file:
        file.write(f"{textwrap.shorten(last, 300) or f'exit code {code}'} ({path})")


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if "--dr-device cpu" in " ".join(plan[0]["flags"]):
        cpu.enable()
        train.import_megatron()  # on a GPU it may ask CUDA, which does not survive a fork
        writers.before_forks()
    from transformers import AutoTokenizer  # noqa: F401  two seconds that each run would spend

    is_first = os.environ["RANK"] == "0"
    for number in _taken(plan, is_first):
        job, began = plan[number], time.monotonic()
        folder = Path(job["folder"])
        code, memory = run(number, folder, job["flags"])
        if code:
            _note_failure(folder, code)
            if os.environ["WORLD_SIZE"] != "1":
                sys.exit(f"run {job['name']!r} failed")  # then torchrun ends the other ranks
        elif is_first:
            kept = {"fingerprint": job["fingerprint"], "memory": memory}
            kept["seconds"] = time.monotonic() - began
            partial = folder / "done.partial"
            partial.write_text(json.dumps(kept), encoding="utf-8")
            partial.rename(folder / "done")


if __name__ == "__main__":
    main()
