"""Numbers on a device that need no copy from the host within a step: such a copy waits for all that
the device has still to do, in the middle of the backward too."""

import functools
from collections.abc import Sequence

import torch


def index(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64 [len(numbers)], copied once for as long as the process lives; never written to."""
    return _index(tuple(numbers), device)


@functools.cache
def _index(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def scalar(value: float, device: torch.device) -> torch.Tensor:
    """[] filled on the device."""
    return torch.full((), value, dtype=torch.float64, device=device)
