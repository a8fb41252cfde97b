"""Which microbatches' gradients are not finite on this rank, where rows are sums of several.

Of each model chunk one small parameter is looked at, the first vector: it lies near the chunk's
input, where whatever is not finite further on arrives in the backward. Two small kernels for each
microbatch; nothing is read before somebody asks.

Legend: C model chunks, n microbatches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch


class Probe:
    """Of one schedule call.

    Args:
        number: microbatches of both roles.
    """

    def __init__(self, model: list[torch.nn.Module], number: int, device: torch.device) -> None:
        self._sum_Cn = torch.zeros(len(model), number, device=device)
        self._current = [0] * len(model)
        self._looked_at = [_first_vector(chunk) for chunk in model]

    @contextmanager
    def looking(self) -> Iterator["Probe"]:
        hooks = [
            parameter.register_hook(partial(self._see, chunk))
            for chunk, parameter in enumerate(self._looked_at)
            if parameter is not None
        ]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def backward(self, chunk: int, microbatch: int) -> None:
        """A microbatch's backward begins on a chunk."""
        self._current[chunk] = microbatch

    def _see(self, chunk: int, gradient: torch.Tensor) -> None:
        self._sum_Cn[chunk, self._current[chunk]] += gradient.detach().sum()

    def bad(self) -> list[int]:
        """Microbatches by number, target ones first. Reads the device."""
        found: list[int] = (~self._sum_Cn.isfinite()).any(0).nonzero().flatten().tolist()
        return found


def _first_vector(chunk: torch.nn.Module) -> torch.nn.Parameter | None:
    trained = [p for p in chunk.parameters() if p.requires_grad]
    return next((p for p in trained if p.dim() == 1), trained[0] if trained else None)
