"""Rollouts without gradient buffers: their memory is the inference's meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_dr.mcore import compat
from megatron_dr.mcore.compat import Chunk
from megatron_dr.mcore.say import say
from megatron_dr.mcore.step.handle import Handle


class Offload:
    """Frees a model's gradient buffers, Megatron's and the plugin's own, while none is needed.

    Args:
        wanted: else they stay where they are.
    """

    def __init__(self, handle: Handle, wanted: bool) -> None:
        self._handle, self._wanted, self._said = handle, wanted, False

    @contextmanager
    def during(self, rollouts: bool) -> Iterator[None]:
        """Free inside, between two steps, where there are rollouts; afterwards there again, zero.

        Nothing is copied: a gradient is of no use once the optimizer has taken it. Rank 0 says
        once how many bytes it was.
        """
        if not (self._wanted and rollouts):
            yield
            return
        try:
            freed = self._handle.offload() + sum(map(_free, self._handle.model))
            if not self._said:
                say(f"{freed:,} bytes of gradient buffers on this rank are free during rollouts")
            self._said = True
            yield
        finally:
            for chunk in self._handle.model:
                chunk.restore_grad_buffers()
            self._handle.restore()


def _free(chunk: Chunk) -> int:
    """Megatron's buffers of a chunk; bytes that were freed."""
    held = _held(chunk)
    chunk.offload_grad_buffers()
    return held - _held(chunk)


def _held(chunk: Chunk) -> int:
    return sum(b.grad_data.untyped_storage().nbytes() for b in compat.grad_buffers([chunk]))
