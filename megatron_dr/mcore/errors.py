"""Bad input: one sentence on rank 0, exit code 2, on every rank, without a hang."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from megatron_dr.mcore import collectives


@contextmanager
def refused() -> Iterator[None]:
    """Turn a ValueError that every rank raises alike into one sentence and exit code 2."""
    try:
        yield
    except ValueError as error:
        leave(str(error))


@contextmanager
def agreed() -> Iterator[None]:
    """Where only some ranks may raise a ValueError: all ranks raise it (collective).

    What refuses may have collectives of its own: a rank that is not there sends its refusal to the
    first one of `collectives.of_all_ranks`.
    """
    try:
        yield
    except collectives.Heard:
        raise
    except ValueError as error:
        collectives.of_all_ranks(collectives.Refusal(str(error)))
    else:
        collectives.of_all_ranks(None)


def leave(message: str, code: int = 2) -> NoReturn:
    """Say it on rank 0, and end this rank."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"megatron_dr: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)
