"""The process that a checkpoint's writers report to: one for all runs that are forks of a process.

Megatron starts one at a run's first save, and it imports torch at the first report: seconds of each
rank, of which a small run has not many.
"""

import sys
from multiprocessing import get_context
from multiprocessing.managers import SyncManager

_WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"
_manager: SyncManager | None = None


def before_forks() -> None:
    """Start it, where Megatron's writer has been imported."""
    global _manager
    if _manager is None and _WRITER in sys.modules:
        _manager = get_context("spawn").Manager()


def in_fork() -> None:
    """A queue in it for this rank alone."""
    if _manager is not None:
        sys.modules[_WRITER]._results_queue = _manager.Queue()  # type: ignore[attr-defined]
