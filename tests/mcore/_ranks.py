"""Run a function on several ranks, each a fork of this process with its own gloo process group."""

import contextlib
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dr.mcore.loop import writers

from . import _warm


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout: int = 120
) -> list[Any]:
    """[function(*args) on rank 0, ..., on rank world - 1].

    The ranks form a process group of their own, which is killed as a whole when one fails or the
    time is over, so that none is left waiting for a peer.
    """
    _warm.before_forks()
    with tempfile.TemporaryDirectory() as folder:
        children: list[int] = []
        try:
            for rank in range(world):
                pid = os.fork()
                if pid == 0:
                    _child(rank, world, Path(folder), function, args)
                children.append(pid)
                os.setpgid(pid, children[0])
            failed = _wait(children, timeout)
        finally:
            if children:
                _kill(children[0])
        messages = [p.read_text() for p in sorted(Path(folder).glob("error*"))]
        if messages:
            raise AssertionError("\n".join(messages))
        if failed:
            raise AssertionError(f"ranks ended badly or ran longer than {timeout} s: {failed}")
        return [pickle.loads((Path(folder) / f"result{r}").read_bytes()) for r in range(world)]


def _child(rank: int, world: int, folder: Path, function: Callable[..., Any], args: Any) -> None:
    code = 1
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / "store"), world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
        writers.in_fork()
        result = function(*args)
        (folder / f"result{rank}").write_bytes(pickle.dumps(result))
        code = 0
    except BaseException:
        (folder / f"error{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
    finally:
        os._exit(code)


def _wait(children: list[int], timeout: int) -> list[str]:
    end, left, failed = time.monotonic() + timeout, set(children), []
    while left and time.monotonic() < end and not failed:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.remove(pid)
                if status:
                    failed.append(f"rank {children.index(pid)}: status {status}")
        time.sleep(0.01)
    if failed:
        time.sleep(0.3)  # let the others write why
    return failed or [f"rank {children.index(pid)}: still running" for pid in left]


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    while True:
        try:
            os.waitpid(-group, 0)
        except ChildProcessError:
            return
