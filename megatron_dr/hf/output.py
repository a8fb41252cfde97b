"""Output that appears under its name only when it is complete, and refusals of all processes."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file


def rank() -> tuple[int, int]:
    """This process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait() -> None:
    """Wait for the other processes."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def agreed() -> Iterator[None]:
    """What one process can't read or write, and why, all raise as a ValueError (collective)."""
    message: str | None = None
    try:
        yield
    except ValueError as error:
        message = str(error)
    except OSError as error:
        message = sentence(error)
    found = [message] * rank()[1]
    if dist.is_initialized():
        dist.all_gather_object(found, message)
    first = next((each for each in found if each is not None), None)
    if first is not None:
        raise ValueError(first)


def sentence(error: OSError) -> str:
    """A file's error in words."""
    return f"{error.filename}: {error.strerror}." if error.filename else f"{error}."


@contextmanager
def complete(folder: Path) -> Iterator[Path]:
    """A folder `<name>.partial` to write into, renamed at the end (collective).

    An earlier attempt's is removed, and after a refusal so is this one's.

    Raises:
        ValueError: the output is there already or can't be made, or a process refused.
    """
    partial = folder.with_name(folder.name + ".partial")
    with agreed():  # nobody makes it before everybody has looked
        if folder.exists():
            raise ValueError(f"{folder}: exists already.")
    try:
        with agreed():
            if rank()[0] == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with agreed():
            yield partial
        with agreed():
            if rank()[0] == 0:
                partial.rename(folder)
    except ValueError:
        if rank()[0] == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file, as transformers and PEFT read it.

    Raises:
        ValueError: it can't be written.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise ValueError(f"{path}: can't be written ({error}).") from None
