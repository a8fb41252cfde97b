"""Output that appears under its name only when it is complete."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist


def rank() -> tuple[int, int]:
    """This process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait() -> None:
    """Wait for the other processes."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def complete(folder: Path) -> Iterator[Path]:
    """A folder `<name>.partial` to write into, renamed at the end (collective).

    An earlier attempt's is removed.

    Raises:
        ValueError: the output is there already.
    """
    if folder.exists():
        raise ValueError(f"{folder}: exists already.")
    partial = folder.with_name(folder.name + ".partial")
    wait()  # nobody makes it before everybody has looked
    if rank()[0] == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait()
    yield partial
    wait()
    if rank()[0] == 0:
        partial.rename(folder)
    wait()
