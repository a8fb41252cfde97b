"""`enable()`: the plugin in Megatron's own training loop, switched on by its `--dr-*` flags.

One line in a copy of Megatron's pretrain_gpt.py, before the arguments are parsed:

    import megatron_dr; megatron_dr.enable()

What is wrapped, and who calls it:
    megatron.training.arguments.add_megatron_arguments    parse_args: the flags
    megatron.training.arguments.validate_args             parse_and_validate_args: bad flags
    megatron.training.training.setup_model_and_optimizer  pretrain: attach, target data
    megatron.training.checkpointing.check_checkpoint_args load_checkpoint: the streams' place
    megatron.training.training.{training_log, evaluate}   train, evaluate_and_print: --dr-metrics
    the three schedules of megatron.core.pipeline_parallel.schedules
                                  get_forward_backward_func: handle.step
Without the plugin's flags each wrapper calls Megatron's function and does nothing else.
"""

import functools
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron_dr.config import DRConfig, TargetConfig
from megatron_dr.mcore import compat, cpu, errors
from megatron_dr.mcore.arguments import add_arguments, configs_from_args
from megatron_dr.mcore.handle import Handle, attach
from megatron_dr.report.metrics import MetricsFile

_SCHEDULES = (
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_without_interleaving",
    "forward_backward_pipelining_with_interleaving",
)
# Kept in Megatron's saved arguments, which are part of every checkpoint.
_STEPS, _CONSUMED = "megatron_dr_steps", "megatron_dr_consumed_target_samples"

_run: "_Run | None" = None
_enabled = False


def enable() -> None:
    """Wrap Megatron's training loop; call it before Megatron's arguments are parsed. Idempotent."""
    global _enabled
    if _enabled:
        return
    _enabled = True
    cpu.enable_if_asked()
    from megatron.core.pipeline_parallel import schedules
    from megatron.training import arguments, checkpointing, training

    _wrap(arguments, "add_megatron_arguments", lambda stock, parser: add_arguments(stock(parser)))
    _wrap(arguments, "validate_args", _validate)
    _wrap(checkpointing, "check_checkpoint_args", _restore)
    _wrap(training, "setup_model_and_optimizer", _set_up)
    _wrap(training, "training_log", _log_training)
    _wrap(training, "evaluate", _log_validation)
    for name in _SCHEDULES:
        _wrap(schedules, name, _schedule)


def _wrap(module: Any, name: str, function: Callable[..., Any]) -> None:
    stock = getattr(module, name)
    setattr(module, name, functools.wraps(stock)(functools.partial(function, stock)))


def _validate(stock: Callable[..., Any], args: Namespace, *rest: Any, **kwargs: Any) -> Any:
    with errors.refused():
        configs = configs_from_args(args)
        if configs is not None:
            compat.check_flags(args)
    result = stock(args, *rest, **kwargs)
    with errors.refused():
        if configs is not None and configs[1].target_data is not None:
            num_target_microbatches(args, configs[1])
    return result


def num_target_microbatches(args: Namespace, target: TargetConfig) -> int:
    """Target microbatches per rank and step.

    Raises:
        ValueError: the target batch is not a multiple of microbatch size x data-parallel size.
    """
    together = args.micro_batch_size * args.data_parallel_size
    if target.target_batch_size % together:
        raise ValueError(
            f"--dr-target-batch-size {target.target_batch_size} is not a multiple of "
            f"--micro-batch-size x data-parallel size = {together}: change one of them."
        )
    return target.target_batch_size // together


def _restore(stock: Callable[..., Any], checkpoint_args: Namespace, *rest: Any, **kw: Any) -> Any:
    """Called when a run resumes, not with --finetune. A checkpoint without our values is at 0."""
    from megatron.training import get_args

    result, args = stock(checkpoint_args, *rest, **kw), get_args()
    for name in (_STEPS, _CONSUMED):
        if hasattr(args, name):
            setattr(args, name, getattr(checkpoint_args, name, 0))
    return result


def _set_up(stock: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
    global _run
    from megatron.core.utils import get_model_config
    from megatron.training import get_args

    args = get_args()
    configs = configs_from_args(args)
    if configs is not None:
        setattr(args, _STEPS, 0)
        setattr(args, _CONSUMED, 0)
    model, optimizer, scheduler = stock(*rest, **kwargs)  # loads a checkpoint
    _run = None
    if configs is not None and optimizer is not None:
        with errors.refused(), errors.agreed():
            _run = _Run(model, optimizer, get_model_config(model[0]), args, *configs)
    return model, optimizer, scheduler


def _log_training(stock: Callable[..., Any], loss_dict: Any, total: Any, rate: Any, iteration: int,
                  *rest: Any, **kwargs: Any) -> Any:  # fmt: skip
    if _run is not None and _run.file is not None:
        seconds = time.monotonic() - _run.step_began
        values = {**loss_dict, "learning rate": rate, "step seconds": seconds}
        _run.file.write("train", iteration, values)
    return stock(loss_dict, total, rate, iteration, *rest, **kwargs)


def _log_validation(stock: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
    result = stock(*rest, **kwargs)
    if _run is not None and _run.file is not None and result[0] is not None:
        _run.file.write("validation", _run.steps_done, result[0])
    return result


def _schedule(stock: Callable[..., Any], **schedule: Any) -> Any:
    if _run is None or not _run.is_for(schedule["model"]):
        return stock(**schedule)
    return _run.call(stock, schedule)


class _Run:
    """The plugin in one run of Megatron's loop: the handle, the target's streams, the metrics."""

    def __init__(
        self, model: list[Any], optimizer: Any, config: Any, args: Namespace, dr: DRConfig,
        target: TargetConfig,
    ) -> None:  # fmt: skip
        self.args = args
        self.handle: Handle = attach(model, optimizer, config, dr)
        self.handle.load_state_dict({"steps": getattr(args, _STEPS)})
        self.file = _metrics_file(target.metrics)
        self.num_target = self.num_valid = 0
        self.train_streams: list[Any] = [None] * len(model)
        self.valid_streams: list[Any] = [None] * len(model)
        if target.target_data is not None:
            self._open_training(target.target_data, target, len(model))
        if target.target_valid_data is not None:
            self._open_validation(target.target_valid_data, len(model))
        self.handle.check_batch(self._num_general(), self.num_target)
        self._fresh_validation = True
        self._iteration: int | None = None
        self._before = (0, 0)
        self.step_began = 0.0

    def _num_general(self) -> int:
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        number: int = get_num_microbatches()
        return number

    def _open_training(self, path: str, target: TargetConfig, num_chunks: int) -> None:
        from megatron.training import print_rank_0

        from megatron_dr.mcore import datasets

        args = self.args
        samples = datasets.target_samples(args, path)
        if target.target_batch_size > len(samples):
            print_rank_0(
                f"megatron_dr: note: the target batch ({target.target_batch_size}) is larger than "
                f"the target set ({len(samples)}): samples repeat within a step"
            )
        self.num_target = num_target_microbatches(args, target)
        size = args.micro_batch_size
        self.train_streams = datasets.target_streams(args, samples, size, num_chunks)
        self._place(self.train_streams, getattr(args, _CONSUMED))

    def _open_validation(self, path: str, num_chunks: int) -> None:
        from megatron_dr.mcore import datasets

        args, size = self.args, self.args.eval_micro_batch_size
        samples = datasets.target_samples(args, path)
        self.valid_streams = datasets.target_streams(args, samples, size, num_chunks)
        self.num_valid = args.eval_global_batch_size // (size * args.data_parallel_size)

    @property
    def steps_done(self) -> int:
        """Iterations of Megatron's loop so far, those before a resume included."""
        return 0 if self._iteration is None else self._iteration + 1

    @staticmethod
    def _place(streams: list[Any], consumed: int) -> None:
        for stream in streams:
            if stream is not None:
                stream.consumed = consumed

    def is_for(self, model: Any) -> bool:
        first = model[0] if isinstance(model, list) else model
        return first is self.handle.model[0]

    def call(self, stock: Callable[..., Any], schedule: dict[str, Any]) -> Any:
        """A training step, or a validation batch, of Megatron's loop."""
        if not schedule.get("forward_only", False):
            return self._train(stock, schedule)
        if schedule.get("collect_non_loss_data", False):
            return stock(**schedule)
        if self._fresh_validation:
            self._place(self.valid_streams, 0)  # every validation sees the same samples
        self._fresh_validation = False
        return self._step(stock, self.valid_streams, self.num_valid, schedule)

    def _train(self, stock: Callable[..., Any], schedule: dict[str, Any]) -> Any:
        args = self.args
        self._fresh_validation = True
        self.step_began = time.monotonic()
        if args.curr_iteration != self._iteration:
            self._iteration = args.curr_iteration
            self._before = (getattr(args, _STEPS), getattr(args, _CONSUMED))
        steps, consumed = self._before  # Megatron may run an iteration again: the same samples
        self.handle.load_state_dict({"steps": steps})
        self._place(self.train_streams, consumed)
        reports = self._step(stock, self.train_streams, self.num_target, schedule)
        taken = self.num_target * schedule["micro_batch_size"] * args.data_parallel_size
        setattr(args, _STEPS, steps + 1)
        setattr(args, _CONSUMED, consumed + taken)
        return reports

    def _step(
        self, stock: Callable[..., Any], streams: list[Any], number: int, schedule: dict[str, Any]
    ) -> Any:
        return self.handle.step(
            stock,
            target_data_iterator=streams if len(streams) > 1 else streams[0],
            num_target_microbatches=number,
            **schedule,
        )


def _metrics_file(path: str | None) -> MetricsFile | None:
    """On the last rank, where Megatron logs; elsewhere and without --dr-metrics, None."""
    import torch.distributed as dist

    if path is None or dist.get_rank() != dist.get_world_size() - 1:
        return None
    return MetricsFile(path)
