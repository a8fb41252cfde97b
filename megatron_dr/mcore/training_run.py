"""A run of Megatron's loop with the plugin: the handle, the target's streams, where they stand.

Megatron calls a schedule for every training step and every validation batch; `TrainingRun.call`
runs it with the streams of that role. Where a run stands is kept in Megatron's arguments (`START`
at its beginning), which Megatron saves with every checkpoint.
"""

import dataclasses
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dr.config import DRConfig, TargetConfig
from megatron_dr.data.domains import DomainPlan, domains_of_step
from megatron_dr.mcore.attach import Handle, attach
from megatron_dr.report.metrics import MetricsFile

_STEPS, _CONSUMED = "megatron_dr_steps", "megatron_dr_consumed_target_samples"
_DIAL = "megatron_dr_dial"
START = {_STEPS: 0, _CONSUMED: 0, _DIAL: None}


def num_target_microbatches(args: Namespace, dr: DRConfig, target: TargetConfig) -> int:
    """Target microbatches per step and rank that runs any.

    Raises:
        ValueError: the target batch can't be divided into them.
    """
    ranks = dr.target_ranks or args.data_parallel_size
    if dr.rows == "sample" and dr.target_pass == "merged":
        general: int = args.global_batch_size // args.micro_batch_size
        if target.target_batch_size % general:
            raise ValueError(
                f"--dr-target-batch-size {target.target_batch_size} is not a multiple of the "
                f"{general} general microbatches of a step, as --dr-target-pass merged needs: "
                "change it."
            )
        return general // ranks
    together = args.micro_batch_size * ranks
    if target.target_batch_size % together:
        what = "--dr-target-ranks" if dr.target_ranks else "data-parallel size"
        raise ValueError(
            f"--dr-target-batch-size {target.target_batch_size} is not a multiple of "
            f"--micro-batch-size x {what} = {together}: change one of them."
        )
    return target.target_batch_size // together


def resumes(args: Namespace) -> bool:
    """Whether the run goes on from a checkpoint's iteration, rather than begins."""
    return bool(args.load) and args.iteration > 0


def new_folder(args: Namespace) -> Path | None:
    """--save, where what a run keeps beside its checkpoints is not there yet; else None."""
    if not args.save:
        return None
    folder = Path(args.save)
    return None if resumes(args) and Path(args.load).resolve() == folder.resolve() else folder


class TrainingRun:
    """The plugin in one run of Megatron's loop: the handle, the target's streams, the metrics."""

    def __init__(
        self, model: list[Any], optimizer: Any, config: Any, args: Namespace, dr: DRConfig,
        target: TargetConfig,
    ) -> None:  # fmt: skip
        self.args = args
        self.num_target = self.num_valid = self.target_size = 0
        self.train_streams: list[Any] = [None] * len(model)
        self.valid_streams: list[Any] = [None] * len(model)
        self.target_ranks = dr.target_ranks or args.data_parallel_size
        samples = self._training_samples(dr, target)
        self.plan = None
        if dr.rows == "domain":
            from megatron_dr.mcore import domain_flags

            self.plan = DomainPlan(domain_flags.domain_weights(args))
            dr = dataclasses.replace(dr, domains=domain_flags.domain_names(args))
        size = None if samples is None else len(samples)
        dr = dataclasses.replace(
            dr, alpha_steps=args.train_iters, target_size=size, packed=bool(args.dr_pack)
        )
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

    def _training_samples(self, dr: DRConfig, target: TargetConfig) -> Any:
        """What the target's batches are drawn from; None without a target."""
        if target.target_data is None:
            return None
        from megatron.training import print_rank_0

        samples = self._samples(target.target_data)
        if target.target_batch_size > len(samples):
            print_rank_0(
                f"megatron_dr: note: the target batch ({target.target_batch_size}) is larger than "
                f"the target set ({len(samples)}): samples repeat within a step"
            )
        return samples

    def _samples(self, path: str) -> Any:
        """The whole target set of a path."""
        from megatron_dr.mcore import datasets

        return datasets.target_samples(self.args, path)

    def _open_training(
        self, samples: Any, dr: DRConfig, target: TargetConfig, num_chunks: int
    ) -> None:
        from megatron_dr.mcore import datasets

        args = self.args
        self.num_target = num_target_microbatches(args, dr, target)
        self.target_size = target.target_batch_size // (self.num_target * self.target_ranks)
        self.train_streams = datasets.target_streams(
            args, samples, self.target_size, num_chunks, self.target_ranks
        )

    def _open_validation(self, path: str, num_chunks: int) -> None:
        from megatron_dr.mcore import datasets

        args, size = self.args, self.args.eval_micro_batch_size
        samples = self._samples(path)
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
        return self._validate(stock, schedule)

    def _validate(self, stock: Callable[..., Any], schedule: dict[str, Any]) -> Any:
        if self._fresh_validation:
            self._place(self.valid_streams, 0)  # every validation sees the same samples
        self._fresh_validation = False
        return self._step(stock, self.valid_streams, self.num_valid, schedule)

    def _prepare(self, schedule: dict[str, Any], steps: int) -> dict[str, Any]:
        """The arguments of a training step's schedule call, after so many steps."""
        return schedule

    def save(self, iteration: int) -> None:
        """A checkpoint of this iteration is about to be written."""

    def _train(self, stock: Callable[..., Any], schedule: dict[str, Any]) -> Any:
        args = self.args
        self._fresh_validation = True
        self.step_began = time.monotonic()
        if args.curr_iteration != self._iteration:
            self._iteration = args.curr_iteration
            self._before = (getattr(args, _STEPS), getattr(args, _CONSUMED), getattr(args, _DIAL))
        steps, consumed, dial = self._before  # Megatron may run an iteration again: the same data
        self.handle.load_state_dict({"steps": steps, "dial": dial})
        schedule = self._prepare(schedule, steps)
        self._place(self.train_streams, consumed)
        number = self.num_target if self.handle.target_due else 0
        merged = self.handle.dr.rows == "sample" and self.handle.dr.target_pass == "merged"
        own = args.micro_batch_size
        try:
            if merged:  # Megatron's batch functions take the size of a microbatch from here
                args.micro_batch_size += self.target_size
            reports = self._step(stock, self.train_streams, number, schedule)
        finally:
            args.micro_batch_size = own
        taken = number * self.target_size * self.target_ranks
        setattr(args, _STEPS, steps + 1)
        setattr(args, _DIAL, self.handle.state_dict()["dial"])
        setattr(args, _CONSUMED, consumed + taken)
        return reports

    def _step(
        self, stock: Callable[..., Any], streams: list[Any], number: int, schedule: dict[str, Any]
    ) -> Any:
        training = not schedule.get("forward_only", False)
        return self.handle.step(
            stock,
            target_data_iterator=streams if len(streams) > 1 else streams[0],
            num_target_microbatches=number,
            target_micro_batch_size=self.target_size if training else None,
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
