"""Random state of a rank: put back, so that a second pass drops out what the first one did, and
forked, so that a role draws without moving another's."""

import hashlib
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


def forked() -> tuple[Any, ...]:
    """A state from which other numbers are drawn than from the present one, which stays. It is a
    function of that: the same on ranks that draw alike, and after a resume."""
    present = save()

    def of_device(state: Any) -> Any:
        if isinstance(state, torch.Generator):  # Megatron's tracker for CUDA graphs
            fork = state.clone_state()
            fork.manual_seed(_seed(state.get_state()))
            return fork
        torch.cuda.manual_seed(_seed(state))
        return torch.cuda.get_rng_state()

    host, device, tracked = present
    try:
        fork = of_device(device), {name: of_device(state) for name, state in tracked.items()}
        torch.default_generator.manual_seed(_seed(host))
        return torch.get_rng_state(), *fork
    finally:
        restore(present)


def _seed(state: torch.Tensor) -> int:
    digest = hashlib.sha256(b"fork" + state.numpy().tobytes()).digest()
    return int.from_bytes(digest[:7], "little")
