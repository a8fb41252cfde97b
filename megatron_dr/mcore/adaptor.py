"""`enable()`: the plugin in Megatron's own training loop, switched on by its `--dr-*` flags.

One line in a copy of Megatron's pretrain_gpt.py, before the arguments are parsed:

    import megatron_dr; megatron_dr.enable()

What is wrapped, and who calls it:
    megatron.training.arguments.add_megatron_arguments    parse_args: the flags
    megatron.training.arguments.validate_args             parse_and_validate_args: bad flags
    megatron.training.training.setup_model_and_optimizer  pretrain: attach, target data
    megatron.training.checkpointing.check_checkpoint_args load_checkpoint: the streams' place
    megatron.training.training.build_train_valid_test_datasets
                                  build_train_valid_test_data_loaders: microbatches of one domain
    megatron.training.training.{training_log, evaluate}   train, evaluate_and_print: --dr-metrics
    the three schedules of megatron.core.pipeline_parallel.schedules
                                  get_forward_backward_func: handle.step
Without the plugin's flags each wrapper calls Megatron's function and does nothing else.
"""

import dataclasses
import functools
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron_dr.config import DRConfig, TargetConfig
from megatron_dr.data.domains import DomainPlan, domains_of_step
from megatron_dr.mcore import compat, cpu, errors, step_log
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
_DIAL = "megatron_dr_dial"
_START = {_STEPS: 0, _CONSUMED: 0, _DIAL: None}

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
    _wrap(training, "build_train_valid_test_datasets", _build_datasets)
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
            num_target_microbatches(args, *configs)
        if configs is not None and configs[0].rows == "domain":
            from megatron_dr.mcore import domain_flags

            domain_flags.check(args)
    return result


def num_target_microbatches(args: Namespace, dr: DRConfig, target: TargetConfig) -> int:
    """Target microbatches per step and rank that runs any.

    Raises:
        ValueError: the target batch is not a multiple of microbatch size x those ranks.
    """
    ranks = dr.target_ranks or args.data_parallel_size
    together = args.micro_batch_size * ranks
    if target.target_batch_size % together:
        what = "--dr-target-ranks" if dr.target_ranks else "data-parallel size"
        raise ValueError(
            f"--dr-target-batch-size {target.target_batch_size} is not a multiple of "
            f"--micro-batch-size x {what} = {together}: change one of them."
        )
    return target.target_batch_size // together


def _restore(stock: Callable[..., Any], checkpoint_args: Namespace, *rest: Any, **kw: Any) -> Any:
    """Called when a run resumes, not with --finetune. A checkpoint without our values is at 0."""
    from megatron.training import get_args

    result, args = stock(checkpoint_args, *rest, **kw), get_args()
    for name, start in _START.items():
        if hasattr(args, name):
            setattr(args, name, getattr(checkpoint_args, name, start))
    return result


def _set_up(stock: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
    global _run
    from megatron.core.utils import get_model_config
    from megatron.training import get_args

    args = get_args()
    configs = configs_from_args(args)
    if configs is not None:
        for name, start in _START.items():
            setattr(args, name, start)
    model, optimizer, scheduler = stock(*rest, **kwargs)  # loads a checkpoint
    _run = None
    if configs is not None and optimizer is not None:
        with errors.refused(), errors.agreed():
            _run = _Run(model, optimizer, get_model_config(model[0]), args, *configs)
    return model, optimizer, scheduler


def _build_datasets(stock: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
    from megatron.training import get_args

    from megatron_dr.mcore import datasets

    train, *others = stock(*rest, **kwargs)
    if getattr(get_args(), "dr_rows", None) == "domain":
        with errors.refused():
            train = datasets.by_domain(get_args(), train)
    return train, *others


def _log_training(stock: Callable[..., Any], loss_dict: Any, total: Any, rate: Any, iteration: int,
                  *rest: Any, **kwargs: Any) -> Any:  # fmt: skip
    if _run is not None and _run.file is not None:
        seconds = time.monotonic() - _run.step_began
        values = {**loss_dict, "learning rate": rate, "step seconds": seconds}
        _run.file.write("train", iteration, values)
    result = stock(loss_dict, total, rate, iteration, *rest, **kwargs)
    if _run is not None and _run.handle.dr.log_blocks and _run.num_target:
        from megatron.training.global_vars import get_tensorboard_writer

        handle = _run.handle
        assert handle.projection is not None
        step_log.write_blocks(
            handle.projection, handle.layout.names, iteration, _run.args, get_tensorboard_writer()
        )
    return result


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
        self.num_target = self.num_valid = 0
        self.train_streams: list[Any] = [None] * len(model)
        self.valid_streams: list[Any] = [None] * len(model)
        self.target_ranks = dr.target_ranks or args.data_parallel_size
        samples = None if target.target_data is None else self._training_samples(target)
        self.plan = None
        if dr.rows == "domain":
            from megatron_dr.mcore import domain_flags

            self.plan = DomainPlan(domain_flags.domain_weights(args))
            dr = dataclasses.replace(dr, domains=domain_flags.domain_names(args))
        size = None if samples is None else len(samples)
        dr = dataclasses.replace(dr, alpha_steps=args.train_iters, target_size=size)
        self.handle: Handle = attach(model, optimizer, config, dr)
        self.file = _metrics_file(target.metrics)
        if samples is not None:
            self._open_training(samples, dr, target, len(model))
        if target.target_valid_data is not None:
            self._open_validation(target.target_valid_data, len(model))
        self.handle.check_batch(self._num_general(), self.num_target)
        self._fresh_validation = True
        self._iteration: int | None = None
        self._before: tuple[int, int, Any] = (0, 0, None)
        self.step_began = 0.0

    def _num_general(self) -> int:
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        number: int = get_num_microbatches()
        return number

    def _training_samples(self, target: TargetConfig) -> Any:
        from megatron.training import print_rank_0

        from megatron_dr.mcore import datasets

        assert target.target_data is not None
        samples = datasets.target_samples(self.args, target.target_data)
        if target.target_batch_size > len(samples):
            print_rank_0(
                f"megatron_dr: note: the target batch ({target.target_batch_size}) is larger than "
                f"the target set ({len(samples)}): samples repeat within a step"
            )
        return samples

    def _open_training(
        self, samples: Any, dr: DRConfig, target: TargetConfig, num_chunks: int
    ) -> None:
        from megatron_dr.mcore import datasets

        args = self.args
        self.num_target = num_target_microbatches(args, dr, target)
        self.train_streams = datasets.target_streams(
            args, samples, args.micro_batch_size, num_chunks, self.target_ranks
        )

    def _open_validation(self, path: str, num_chunks: int) -> None:
        from megatron_dr.mcore import datasets

        args, size = self.args, self.args.eval_micro_batch_size
        samples = datasets.target_samples(args, path)
        self.valid_streams = datasets.target_streams(
            args, samples, size, num_chunks, args.data_parallel_size
        )
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
            self._before = (getattr(args, _STEPS), getattr(args, _CONSUMED), getattr(args, _DIAL))
        steps, consumed, dial = self._before  # Megatron may run an iteration again: the same data
        self.handle.load_state_dict({"steps": steps, "dial": dial})
        self._place(self.train_streams, consumed)
        reports = self._step(stock, self.train_streams, self.num_target, schedule)
        taken = self.num_target * schedule["micro_batch_size"] * self.target_ranks
        setattr(args, _STEPS, steps + 1)
        setattr(args, _DIAL, self.handle.dial.state)
        setattr(args, _CONSUMED, consumed + taken)
        return reports

    def _step(
        self, stock: Callable[..., Any], streams: list[Any], number: int, schedule: dict[str, Any]
    ) -> Any:
        return self.handle.step(
            stock,
            target_data_iterator=streams if len(streams) > 1 else streams[0],
            num_target_microbatches=number,
            domains=self._domains(schedule),
            **schedule,
        )

    def _domains(self, schedule: dict[str, Any]) -> list[int]:
        """Domain of each of this rank's general microbatches in the step that is under way."""
        if self.plan is None or schedule.get("forward_only", False):
            return []
        from megatron.core import mpu

        from megatron_dr.mcore import domain_flags

        args, ranks = self.args, self.args.data_parallel_size
        return domains_of_step(
            self.plan,
            args.consumed_train_samples // (args.micro_batch_size * ranks),
            schedule["num_microbatches"],
            mpu.get_data_parallel_rank(),
            ranks,
            domain_flags.data_ranks_per_row(),
        )


def _metrics_file(path: str | None) -> MetricsFile | None:
    """On the last rank, where Megatron logs; elsewhere and without --dr-metrics, None."""
    import torch.distributed as dist

    if path is None or dist.get_rank() != dist.get_world_size() - 1:
        return None
    return MetricsFile(path)
