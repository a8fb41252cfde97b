"""A progress bar of the training steps, on a terminal; a file or a pipe has Megatron's lines alone.

On the rank that logs, whose lines go above the bar. Without the package rich there is none.
"""

import contextlib
import importlib.util
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist


class Bar:
    """Of a run of so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._progress: Any = None
        self._task: Any = None

    @classmethod
    def of(cls, args: Namespace) -> "Bar | None":
        """None where nobody looks: each rank may have a terminal, but one of them logs."""
        if dist.get_rank() != dist.get_world_size() - 1 or not importlib.util.find_spec("rich"):
            return None
        watched = sys.stdout.isatty() and sys.stderr.isatty()  # or lines would change their stream
        return cls(args.train_iters) if watched else None

    @contextlib.contextmanager
    def shown(self, done: int) -> Iterator[None]:
        """Inside, of a run that goes on from a step.

        No thread draws it: a process with threads is not to be forked, as checkpoints' writers are.
        """
        from rich import progress as rich

        columns = (rich.TextColumn("steps"), rich.BarColumn(), rich.MofNCompleteColumn(),
                   rich.TimeElapsedColumn(), rich.TimeRemainingColumn())  # fmt: skip
        with rich.Progress(*columns, auto_refresh=False) as self._progress:
            self._task = self._progress.add_task("steps", total=self.steps, completed=done)
            self._progress.refresh()
            try:
                yield
            finally:
                self._progress.refresh()
        self._progress = None

    def at(self, step: int) -> None:
        """So many steps are done."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, refresh=True)
