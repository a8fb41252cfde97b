"""The processes that write a run's checkpoints end with the rank that has started them.

Megatron starts two at most: one that a rank's writers report to, at its first save, and with
--async-save one that writes. Neither looks for its parent, so that of a rank that is killed they
would stay for ever. And of runs that are forks of a process all may report to one: it imports torch
at the first report, seconds of each rank, of which a small run has not many.
"""

import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.managers import SyncManager
from typing import Any

_WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"
_manager: SyncManager | None = None


def enable() -> None:
    """Have Megatron start them so, and replace its tracker file; called once."""
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    from megatron_dr.mcore import compat  # here: those processes import this file
    from megatron_dr.mcore.loop import tracker

    compat.open_checkpoints_by(tracker.opened)
    stock = filesystem_async.get_write_results_queue
    filesystem_async.get_write_results_queue = partial(_results, stock)
    async_utils.PersistentAsyncCaller.async_loop = staticmethod(write_until_the_end)


def before_forks() -> None:
    """Start it, where Megatron's writer has been imported."""
    global _manager
    if _manager is None and _WRITER in sys.modules:
        _manager = _started("spawn")


def in_fork() -> None:
    """A queue in it for this rank alone."""
    if _manager is not None:
        sys.modules[_WRITER]._results_queue = _manager.Queue()  # type: ignore[attr-defined]


def _results(stock: Callable[..., Any], mp_mode: str = "spawn") -> Any:
    """Megatron's `get_write_results_queue`, of a process that ends with this one."""
    module: Any = sys.modules[_WRITER]
    if module._results_queue is None:
        module._results_queue = _started(mp_mode).Queue()
    return stock(mp_mode)


def write_until_the_end(*args: Any) -> None:
    """Megatron's `PersistentAsyncCaller.async_loop`, in a process that ends with the rank's."""
    from megatron_dr.mcore import cpu

    end_with_parent()
    cpu.enable_if_asked()  # it asks for a device
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.async_loop(*args)


def end_with_parent() -> None:
    """End this process, one of multiprocessing's, when the one that has started it ends."""
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _started(mode: str) -> SyncManager:
    manager = SyncManager(ctx=get_context(mode))
    manager.start(end_with_parent)
    return manager
