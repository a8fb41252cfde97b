"""Files that a run reads as it goes: whether they are still those that it began with.

An indexed dataset is a map of its files: what is written to them reaches the run, without a word.
All other data are read into memory at the start, and the digests in a checkpoint are of then.
"""

import os
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from megatron_dr.config.target import TargetConfig
from megatron_dr.config.target_sets import by_name
from megatron_dr.mcore.loop.record import data_paths
from megatron_dr.mcore.say import log

State = tuple[int, int, int]  # inode, size, time of the last change in ns


class DataWatch:
    """Of one rank's view of the files, each told once."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._seen: dict[Path, State | None] = {file: _state(file) for file in files}

    @classmethod
    def of(cls, args: Namespace, targets: Iterable[TargetConfig]) -> "DataWatch":
        """The indexed datasets of both roles; on the first rank of each machine."""
        if int(os.environ.get("LOCAL_RANK", dist.get_rank())) != 0:
            return cls([])
        given = [(one.target_data, one.target_valid_data, one.target_test_data) for one in targets]
        named = [by_name(each) for values in given for each in values]
        files = data_paths(args, [path for paths in named for path in paths.values()])
        return cls(file for file in files if file.suffix in (".bin", ".idx"))

    def look(self, iteration: int) -> None:
        """Say what is gone or was changed."""
        for file, before in list(self._seen.items()):
            now = _state(file)
            if now == before:
                continue
            self._seen[file] = now
            what = "is gone" if now is None else "was changed"
            log(
                f"megatron_dr: WARNING: {file} {what} while the run reads it (seen at iteration "
                f"{iteration}, on rank {dist.get_rank()}): steps since the last checkpoint may be "
                "of other data; put it back and resume from an earlier checkpoint"
            )


def _state(file: Path) -> State | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
