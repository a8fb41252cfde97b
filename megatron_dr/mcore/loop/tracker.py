"""The file that names the last whole checkpoint is there whole or not at all.

Megatron cuts it to nothing and writes it anew: of a run that is killed in between, or whose disk is
full, no checkpoint could be found any more.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

NAME = "latest_checkpointed_iteration.txt"


def opened(stock: Callable[..., Any], path: Any, mode: str = "r", *rest: Any, **kwargs: Any) -> Any:
    """As `open`; of the tracker file to be written: another, which replaces it when it is closed.

    Args:
        stock: what opens all other files, those of object stores too.
    """
    if mode == "w" and os.path.basename(path) == NAME and "://" not in str(path):
        return _replacing(path)
    return stock(path, mode, *rest, **kwargs)


@contextmanager
def _replacing(path: str) -> Iterator[Any]:
    partial = f"{path}.partial"
    with open(partial, "w") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
