"""Roles: which microbatch is target or general, and where its gradient goes.

One schedule call runs the target's microbatches first, then the general ones. Under 1F1B and
interleaving, forwards and backwards of different microbatches alternate, so the router binds the
row's buffers twice: before a microbatch's forward (fused weight gradients remember the buffer
there) and when its backward begins, which a hook on the stage's output tells.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_dr.mcore.grad_rows import GradRows

Report = dict[str, torch.Tensor]


class RoleRouter:
    """Wraps a step's `forward_step_func`; lives for one schedule call.

    Args:
        rows: the buffers; None when gradients are not routed (validation).
        num_target, num_general: microbatches of each role.
        target_data_iterator: as the schedule's own: one iterator, or one per model chunk.
    """

    def __init__(
        self,
        model: list[torch.nn.Module],
        rows: GradRows | None,
        num_target: int,
        num_general: int,
        target_data_iterator: Any,
    ) -> None:
        self.rows = rows
        self.num_target = num_target
        self.num_general = num_general
        self._chunk = {id(module): number for number, module in enumerate(model)}
        self._target_data = target_data_iterator
        self._forwards: Counter[int] = Counter()
        self._backwards: Counter[int] = Counter()
        self.tokens: list[torch.Tensor | int] = [0, 0]  # general, target

    def row(self, microbatch: int) -> int:
        """Row of a microbatch: the target's, or the slot of a general one."""
        assert self.rows is not None
        general = microbatch - self.num_target
        if general < 0:
            return self.rows.target
        return general * self.rows.num_slots // self.num_general

    def wrap(self, forward_step_func: Callable[..., Any]) -> Callable[..., Any]:
        def forward_step(data_iterator: Any, module: torch.nn.Module, *args: Any) -> Any:
            chunk = self._chunk[id(module)]
            microbatch = self._forwards[chunk]
            self._forwards[chunk] += 1
            is_target = microbatch < self.num_target
            if self.rows is not None:
                self.rows.bind(self.row(microbatch), chunk)
            data = self._target_iterator(chunk) if is_target else data_iterator
            output, loss_func = forward_step_func(data, module, *args)
            if self.rows is not None:
                self._mark_backward(output, chunk, self.row(microbatch))
            return output, self._count_tokens(loss_func, is_target)

        return forward_step

    def _target_iterator(self, chunk: int) -> Iterator[Any] | None:
        if isinstance(self._target_data, list):
            iterator: Iterator[Any] | None = self._target_data[chunk]
            return iterator
        return self._target_data  # type: ignore[no-any-return]

    def _mark_backward(self, output: torch.Tensor, chunk: int, row: int) -> None:
        if not output.requires_grad:  # a stage without trainable parameters
            self._backwards[chunk] += 1
            return

        def begin(grad: torch.Tensor) -> None:
            self._backwards[chunk] += 1
            assert self.rows is not None
            self.rows.bind(row, chunk)

        output.register_hook(begin)

    def _count_tokens(self, loss_func: Callable[..., Any], is_target: bool) -> Callable[..., Any]:
        if loss_func is None:
            return loss_func

        def counted(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            result = loss_func(output, *args, **kwargs)
            if isinstance(result, tuple) and len(result) == 3:
                self.tokens[is_target] = self.tokens[is_target] + result[1]
            return result

        return counted

    def check_complete(self) -> None:
        """Raise unless every microbatch of every chunk ran backward once."""
        expected = self.num_target + self.num_general
        for chunk in self._chunk.values():
            if self._forwards[chunk] != expected or self._backwards[chunk] != expected:
                raise RuntimeError(
                    f"model chunk {chunk} ran {self._forwards[chunk]} forwards and "
                    f"{self._backwards[chunk]} backwards of {expected} microbatches, so gradients "
                    "of target and general data are mixed: the schedule must call "
                    "forward_step_func once per microbatch and run each backward once."
                )


def merge_reports(reports: list[Report], num_target: int, metrics: Report) -> list[Report]:
    """One report per general microbatch, with the target's and the step's values beside its own.

    Megatron's loop sums two-element values (sum, count) over microbatches and data ranks and
    divides; one-element values it averages over microbatches. Both stay right: the target's pairs
    are summed into the first report and are zero in the others.
    """
    target, general = reports[:num_target], [dict(r) for r in reports[num_target:]]
    if not general:
        return reports
    for key in target[0] if target else ():
        name = "target loss" if key == "lm loss" else f"target {key}"
        values = torch.stack([t[key].view(-1) for t in target])
        pair = values.shape[1] == 2
        for number, report in enumerate(general):
            if not pair:
                report[name] = values.mean(0)
            else:
                report[name] = values.sum(0) if number == 0 else torch.zeros_like(values[0])
    for name, value in metrics.items():
        pair_value = torch.stack([value.float(), torch.ones_like(value, dtype=torch.float32)])
        for number, report in enumerate(general):
            report[name] = pair_value if number == 0 else torch.zeros_like(pair_value)
    return general
