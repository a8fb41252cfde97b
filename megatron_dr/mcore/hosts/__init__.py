"""The plugin in RL systems that call Megatron's schedules themselves: verl, slime, NeMo-RL.

`regularised` and `regularise_next` turn such a host's training call into `handle.step`; the modules
`verl`, `slime` and `nemo_rl` put them at the host's own extension points, and `bridge` is the same
for a training loop, Megatron-Bridge's. See docs/rl_systems.md.

Hosts take the schedule from `get_forward_backward_func()`, which looks its three functions up by
name at each call. These names are replaced while a step is awaited, so a host that imported
`get_forward_backward_func` earlier is reached too; after it they are Megatron's own again.

The target's microbatches are made by the host: its training call is run on a target batch and
stopped when it arrives at the schedule. What it brings (how a microbatch is read, its loss, how the
loss is scaled to the number of microbatches) is the target's part of the step.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_model_config

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore import attach as plugin
from megatron_dr.mcore import compat
from megatron_dr.mcore.attach import Handle
from megatron_dr.mcore.compat import SCHEDULES


@dataclass
class Training:
    """Steps that are awaited on one model.

    Attributes:
        target: runs the host's own training call on the step's target batch.
        samples: in the step's target batch, over all ranks, where `target` says it: what
            alpha's rule counts. None: microbatches times their size.
        after: is called after each step.
        once: whether only the next training call is a step of ours.
        steps: training calls so far.
        target_reports: what the target's losses reported in the last step, on the last stage.
    """

    handle: Handle
    target: Callable[[], Any]
    samples: int | None = None
    after: Callable[[], object] | None = None
    once: bool = False
    steps: int = 0
    target_reports: list[Any] = field(default_factory=list)


class _Reached(BaseException):
    """The host's call arrived at the schedule. Not an Exception: hosts may catch these."""

    def __init__(self, schedule: dict[str, Any]) -> None:
        super().__init__("the target's call arrived at Megatron's schedule")
        self.schedule = schedule


REPLAY = "megatron_dr does not support {}'s router replay: target samples have no routes: drop it."
# Runs a training call: (Megatron's own schedule, its arguments) -> reports
Run = Callable[[Callable[..., Any], dict[str, Any]], Any]

_awaited: dict[int, Training] = {}
_always: dict[int, Run] = {}
_holders: set[int] = set()  # who wants the names replaced before a step is awaited
_stock: dict[str, Callable[..., Any]] = {}
_reaching = False


def attach(model: Any, optimizer: Any, dr: DRConfig) -> Handle:
    """`megatron_dr.attach` on a host's model; idempotent.

    Raises:
        ValueError: as there, or rows and dials that a host's microbatches can't give.
    """
    _check(dr)
    chunks = list(model) if isinstance(model, (list, tuple)) else [model]
    return plugin.attach(chunks, optimizer, get_model_config(chunks[0]), dr)


@contextlib.contextmanager
def regularised(handle: Handle, target: Callable[[], Any]) -> Iterator[Training]:
    """Inside, each training call on the handle's model is a step of ours; others are untouched.

    Args:
        target: runs the host's own training call on a target batch: the same function with other
            data. It is stopped at the schedule, so nothing is computed or updated by it.

    Raises:
        RuntimeError: at the end, where no training call arrived.
    """
    outer = _awaited.get(id(handle.model[0]))
    training = _await(Training(handle, target))
    try:
        yield training
        if training.steps == 0:
            raise RuntimeError(NOT_REACHED)
    finally:
        forget(handle)
        if outer is not None:
            _await(outer)


def regularise_next(handle: Handle, target: Callable[[], Any]) -> Training:
    """As `regularised`, for the next training call alone: for hooks that run before a step.

    Raises:
        RuntimeError: the step that was awaited before did not arrive.
    """
    if id(handle.model[0]) in _awaited:
        forget(handle)
        raise RuntimeError(NOT_REACHED)
    return _await(Training(handle, target, once=True))


def of_data_ranks(samples: int) -> int:
    """Samples of all data-parallel ranks, of which this one has so many (collective)."""
    number = torch.tensor([samples], device=compat.device())
    dist.all_reduce(number, group=parallel_state.get_data_parallel_group())
    return int(number)


def reaching() -> bool:
    """Whether a host's call on a target batch is on its way to the schedule."""
    return _reaching


def hold(holder: object) -> None:
    """Replace the schedules' names from now on: for a host that takes its schedule early."""
    _replace()
    _holders.add(id(holder))


def release(holder: object) -> None:
    """Undo `hold`. Safe to call twice."""
    _holders.discard(id(holder))
    _restore()


def always(handle: Handle, run: Run) -> None:
    """Until `forget`, `run` does each training call on the handle's model."""
    _replace()
    _always[id(handle.model[0])] = run


def forget(handle: Handle) -> None:
    """No call on the handle's model is ours any more. Safe to call twice."""
    _awaited.pop(id(handle.model[0]), None)
    _always.pop(id(handle.model[0]), None)
    _restore()


NOT_REACHED = (
    "the host's training step did not call one of Megatron's schedules on the model that "
    "megatron_dr is attached to, so it was not regularised: attach to the model that is trained, "
    "and let the host take its schedule from get_forward_backward_func()."
)


def _check(dr: DRConfig) -> None:
    wrong = {
        f"rows {dr.rows!r}": dr.row_kind.in_layers or dr.row_kind.named,
        f"target_ranks {dr.target_ranks}": dr.target_ranks > 0,
    }
    for name, found in wrong.items():
        if found:
            raise ValueError(
                f"megatron_dr does not support {name} in a host that makes its own microbatches: "
                "use rows 'rank' or 'slot', and no target_ranks."
            )


def _await(training: Training) -> Training:
    _replace()
    _awaited[id(training.handle.model[0])] = training
    return training


def _replace() -> None:
    if not _stock:
        for name in SCHEDULES:
            _stock[name] = getattr(schedules, name)
            setattr(schedules, name, _replacement(_stock[name]))


def _restore() -> None:
    """Megatron's own names, where nobody wants ours."""
    if not (_awaited or _always or _holders):
        for name, function in _stock.items():
            setattr(schedules, name, function)
        _stock.clear()


def _replacement(stock: Callable[..., Any]) -> Callable[..., Any]:
    def schedule_of_host(**schedule: Any) -> Any:
        model = schedule["model"]
        first = model[0] if isinstance(model, (list, tuple)) else model
        training = _awaited.get(id(first))
        if schedule.get("forward_only", False):
            return stock(**schedule)
        if training is None:
            run = _always.get(id(first))
            return stock(**schedule) if run is None else run(stock, schedule)
        if _reaching:
            raise _Reached(schedule)
        try:
            return _step(training, stock, schedule)
        finally:
            if training.once:
                forget(training.handle)

    return schedule_of_host


def _step(training: Training, stock: Callable[..., Any], schedule: dict[str, Any]) -> list[Any]:
    """One step of ours. Returns the general microbatches' reports, as the host made them."""
    target = _reach(training.target)
    check_shapes(training.handle, target, schedule)
    general, of_target = list[Any](), list[Any]()

    def forward_step(data: Any, module: Any, *rest: Any) -> Any:
        if isinstance(data, _TargetData):
            output, loss = target["forward_step_func"](data.iterator, module, *rest)
            return output, _reporting(loss, of_target)
        output, loss = schedule["forward_step_func"](data, module, *rest)
        return output, _reporting(loss, general)

    iterators = target["data_iterator"]
    marked = [_TargetData(i) for i in iterators] if isinstance(iterators, list) else None
    training.handle.step(
        stock, target_data_iterator=marked or _TargetData(iterators),
        num_target_microbatches=target["num_microbatches"], target_samples=training.samples,
        **{**schedule, "forward_step_func": forward_step},
    )  # fmt: skip
    training.steps += 1
    training.target_reports = of_target
    if training.after is not None:
        training.after()
    return general


@dataclass(frozen=True)
class _TargetData:
    """A target iterator, or None on a stage that reads no data; it tells a microbatch's role."""

    iterator: Any


def _reporting(loss_func: Callable[..., Any] | None, reports: list[Any]) -> Any:
    """Keep a host's report, of any type, from those of the plugin, which are pairs of tensors."""
    if loss_func is None:
        return None

    def loss(output: Any, *args: Any, **kwargs: Any) -> Any:
        *result, report = loss_func(output, *args, **kwargs)
        reports.append(report)
        return (*result, {})

    return loss


def _reach(target: Callable[[], Any]) -> dict[str, Any]:
    """The schedule's arguments of the host's training call on the target batch."""
    global _reaching
    _reaching = True
    try:
        target()
    except _Reached as reached:
        return reached.schedule
    except StopIteration:
        raise RuntimeError("the target data ended: give an iterator without an end.") from None
    finally:
        _reaching = False
    raise RuntimeError(
        "the function that runs the host's training call on a target batch returned without one: "
        "it must call the host's own training function on the model that is trained, with "
        "gradients (not forward_only)."
    )


def check_shapes(handle: Handle, target: dict[str, Any], general: dict[str, Any]) -> None:
    """Stages exchange tensors of the general shape, unless their lengths may vary."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    if stages == 1 or getattr(handle.config, "variable_seq_lengths", False):
        return
    for name in ("seq_length", "micro_batch_size", "decoder_seq_length"):
        if target.get(name) != general.get(name):
            raise ValueError(
                f"target microbatches have {name} {target.get(name)}, general ones "
                f"{general.get(name)}: with pipeline parallelism and without "
                "variable_seq_lengths both must be the same."
            )
