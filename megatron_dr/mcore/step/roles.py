"""Roles: which microbatch is target or general, and which one runs forward or backward now.

One schedule call runs the target's microbatches first, then the general ones. Under 1F1B and
interleaving, forwards and backwards of different microbatches alternate; that a backward begins, a
hook on the stage's output tells.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import torch

from megatron_dr.mcore import progress
from megatron_dr.mcore.step.probe import Probe
from megatron_dr.mcore.step.sets import TargetSets, Weighing, of_sets

Report = dict[str, torch.Tensor]


class Opens(Protocol):
    def open(self, target: bool, forward: bool) -> None: ...


class MicrobatchRouter:
    """Wraps a step's `forward_step_func`; lives for one schedule call. Target microbatches first.

    Args:
        num_target, num_general: microbatches of each role.
        target_data_iterator: as the schedule's own: one iterator, or one per model chunk.

    Attributes:
        books: told of each microbatch's role when its forward or backward begins (`step.books`).
        probe: tells which microbatches' gradients are not finite, where somebody asks.
        weighing: of several target sets.
    """

    books: Opens | None = None
    probe: Probe | None = None
    weighing: Weighing | None = None

    def __init__(
        self, model: list[torch.nn.Module], num_target: int, num_general: int,
        target_data_iterator: Any,
    ) -> None:  # fmt: skip
        self.num_target = num_target
        self.num_general = num_general
        self._chunk = {id(module): number for number, module in enumerate(model)}
        self._target_data = target_data_iterator
        self._forwards: Counter[int] = Counter()
        self._backwards: Counter[int] = Counter()

    def enter(self, chunk: int, microbatch: int, backward: bool) -> None:
        """A microbatch's forward or backward begins on a model chunk."""

    def forwarded(self, chunk: int, microbatch: int, loss_func: Any) -> Any:
        """A microbatch's forward is done; returns the loss function to use."""
        return loss_func

    def wrap(self, forward_step_func: Callable[..., Any]) -> Callable[..., Any]:
        def forward_step(data_iterator: Any, module: torch.nn.Module, *args: Any) -> Any:
            chunk = self._chunk[id(module)]
            microbatch = self._forwards[chunk]
            self._forwards[chunk] += 1
            self._begin(chunk, microbatch, backward=False)
            if microbatch < self.num_target:
                target = self._target_data
                data_iterator = target[chunk] if isinstance(target, list) else target
            output, loss_func = forward_step_func(data_iterator, module, *args)
            if self.weighing is not None and loss_func is not None and microbatch < self.num_target:
                loss_func = self.weighing.loss(loss_func, microbatch)
            if isinstance(output, torch.Tensor):
                self._mark_backward(output, chunk, microbatch)
            else:  # a last stage with several outputs: backward begins at their loss
                loss_func = self._marking(loss_func, chunk, microbatch)
            return output, self.forwarded(chunk, microbatch, loss_func)

        return forward_step

    def _marking(self, loss_func: Any, chunk: int, microbatch: int) -> Callable[..., Any]:
        def marked(output: Any, *args: Any, **kwargs: Any) -> Any:
            result = loss_func(output, *args, **kwargs)
            self._mark_backward(result[0], chunk, microbatch)
            return result

        return marked

    def _mark_backward(self, output: torch.Tensor, chunk: int, microbatch: int) -> None:
        if not output.requires_grad:  # validation, or a stage without trainable parameters
            self._backwards[chunk] += 1
            return

        def begin(_: torch.Tensor) -> None:
            self._backwards[chunk] += 1
            self._begin(chunk, microbatch, backward=True)

        output.register_hook(begin)

    def _begin(self, chunk: int, microbatch: int, backward: bool) -> None:
        is_target = microbatch < self.num_target
        number = microbatch if is_target else microbatch - self.num_target
        progress.at("target" if is_target else "general", number, backward)
        if self.books is not None:
            self.books.open(is_target, forward=not backward)
        if backward and self.probe is not None:
            self.probe.backward(chunk, microbatch)
        if backward and self.weighing is not None:
            self.weighing.backward(number if is_target else None)
        self.enter(chunk, microbatch, backward)

    def bad(self) -> list[tuple[str, int, list[int]]]:
        """Microbatches whose gradient is not finite, by role and number in it. Reads the device."""
        found = [] if self.probe is None else self.probe.bad()
        first = self.num_target
        of_target = [("target", n, list[int]()) for n in found if n < first]
        return of_target + [("general", n - first, list[int]()) for n in found if n >= first]

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


def merge_reports(
    reports: list[Report], num_target: int, metrics: Report, both: bool,
    sets: TargetSets | None = None,
) -> list[Report]:  # fmt: skip
    """The general microbatches' reports, with the target's and the step's values beside their own.

    Megatron's loop sums two-element values (sum, count) over microbatches and data ranks and
    divides; one-element values it averages over microbatches. Both stay right: the target's pairs
    are summed into the first report and are zero in the others.

    Args:
        both: whether this rank ran both roles; else all of its reports are of one, and it reports
            the other's pairs as zero, since every rank must report the same names.
        sets: of several, each has values of its own, 'target loss NAME'.
    """
    if not reports:
        return reports
    target, general = reports[:num_target], [dict(r) for r in reports[num_target:]]
    blank = {key: torch.zeros_like(value) for key, value in reports[0].items()}
    if not both:
        target, general = target or [blank], general or [dict(blank)]
    if not general:
        return reports
    for ending, numbers in of_sets(sets, num_target) if target else ():
        _add_target(general, [target[n] for n in numbers] or [blank], ending)
    return with_values(general, metrics)


def _add_target(general: list[Report], target: list[Report], ending: str) -> None:
    """The values of one target set's microbatches, under names of their own."""
    for key in target[0]:
        name = ("target loss" if key == "lm loss" else f"target {key}") + ending
        values = torch.stack([t[key].view(-1) for t in target])
        pair = values.shape[1] == 2
        for number, report in enumerate(general):
            if not pair:
                report[name] = values.mean(0)
            else:
                report[name] = values.sum(0) if number == 0 else torch.zeros_like(values[0])


def with_values(reports: list[Report], values: Report) -> list[Report]:
    """A step's reports with values of the step, which Megatron's loop logs as they are."""
    for name, value in values.items():
        pair_value = torch.stack([value.float(), torch.ones_like(value, dtype=torch.float32)])
        for number, report in enumerate(reports):
            report[name] = pair_value if number == 0 else torch.zeros_like(pair_value)
    return reports
