"""Bad input: one sentence on rank 0, exit code 2, on every rank, without a hang."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_dr.mcore import collectives


@contextmanager
def refused() -> Iterator[None]:
    """Turn a ValueError that every rank raises alike into one sentence and exit code 2."""
    try:
        yield
    except ValueError as error:
        _leave(str(error))


@contextmanager
def agreed() -> Iterator[None]:
    """Where only some ranks may raise a ValueError: all ranks raise it (collective)."""
    message = None
    try:
        yield
    except ValueError as error:
        message = str(error)
    found = next((m for m in collectives.of_all_ranks(message) if m is not None), None)
    if found is not None:
        raise ValueError(found)


def _leave(message: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"megatron_dr: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)
