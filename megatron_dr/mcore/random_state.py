"""Random state of a rank, put back: a second pass drops out what the first one did."""

from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker


def save() -> tuple[Any, ...]:
    """The default generators' states, and those of Megatron's tracker."""
    tracker = get_cuda_rng_tracker()
    return torch.get_rng_state(), torch.cuda.get_rng_state(), tracker.get_states()


def restore(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state(state[1])
    get_cuda_rng_tracker().set_states(state[2])
