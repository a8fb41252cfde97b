"""Where a microbatch's gradient goes: to the buffer of its row.

Buffers are bound twice: before a microbatch's forward, as fused weight gradients remember the
buffer there, and when its backward begins.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_dr.mcore.buffer_rows.buffers import Buffers
from megatron_dr.mcore.step.roles import MicrobatchRouter


class RoleRouter(MicrobatchRouter):
    """Binds each microbatch's gradient to the buffer of its row.

    Args:
        buffers: of this rank.
        backward: called when a microbatch's backward begins: its chunk, its local buffer, and
            whether it is the last of a run of microbatches of that buffer.
        domains: domain number of each general microbatch, with domain rows.
        sets: set number of each target microbatch, where each set has a buffer.

    Attributes:
        tokens, microbatches: of each domain (one entry without domain rows) and, last, the target.
    """

    def __init__(
        self, model: list[torch.nn.Module], buffers: Buffers,
        backward: Callable[[int, int, bool], None], num_target: int, num_general: int,
        target_data_iterator: Any, domains: Sequence[int], sets: Sequence[int] = (),
    ) -> None:  # fmt: skip
        super().__init__(model, num_target, num_general, target_data_iterator)
        self._backward = backward
        self._sets = sets if buffers.row_map.targets > 1 else ()
        self.buffers, self._domains, row_map = buffers, domains, buffers.row_map
        kinds = row_map.slots if row_map.by_domain else 1
        self.tokens: list[torch.Tensor | int] = [0] * (kinds + 1)
        self.microbatches: list[torch.Tensor | int] = [0] * (kinds + 1)
        if row_map.by_domain:
            self._check_domains()

    def _check_domains(self) -> None:
        slots = self.buffers.row_map.slots
        if len(self._domains) != self.num_general or not all(0 <= d < slots for d in self._domains):
            raise ValueError(
                f"domain rows need a domain number below {slots} for each of the "
                f"{self.num_general} general microbatches, not {list(self._domains)}."
            )

    def row(self, microbatch: int) -> int:
        """Local buffer of a microbatch: the target's, or the slot of a general one."""
        general, row_map = microbatch - self.num_target, self.buffers.row_map
        if general < 0 and row_map.target_groups:
            return 0
        if general < 0 and self._sets:
            return row_map.slots + self._sets[microbatch]
        if general < 0:
            return row_map.slots + microbatch * row_map.num_targets // self.num_target
        if row_map.by_domain:
            return self._domains[general]
        return general * row_map.slots // self.num_general

    def _kind(self, microbatch: int) -> int:
        """Where a microbatch counts: its domain, or -1 for the target."""
        general = microbatch - self.num_target
        if general < 0:
            return -1
        return self._domains[general] if self._domains else 0

    def enter(self, chunk: int, microbatch: int, backward: bool) -> None:
        row, number = self.row(microbatch), self.num_target + self.num_general
        self.buffers.bind(row, chunk)
        if backward:
            last = microbatch + 1 == number or self.row(microbatch + 1) != row
            self._backward(chunk, row, last)

    def forwarded(self, chunk: int, microbatch: int, loss_func: Any) -> Any:
        kind = self._kind(microbatch)
        self.microbatches[kind] += 1 if chunk == 0 else 0
        if loss_func is None:
            return None

        def counted(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            result = loss_func(output, *args, **kwargs)
            if isinstance(result, tuple) and len(result) == 3:
                self.tokens[kind] = self.tokens[kind] + result[1]
            return result

        return counted
