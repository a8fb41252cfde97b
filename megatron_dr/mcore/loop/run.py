"""A run of Megatron's loop with the plugin: the handle, its source's streams, where they stand.

Megatron calls a schedule for every training step and every validation batch; `TrainingRun.call`
runs it with the streams of that role. Where a run stands is kept in Megatron's arguments (`START`
at its beginning), which Megatron saves with every checkpoint.
"""

import contextlib
import dataclasses
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine

from megatron_dr.config.dr import DRConfig
from megatron_dr.config.target import TargetConfig
from megatron_dr.config.target_sets import TargetSet
from megatron_dr.data.mixed import MixedStream
from megatron_dr.data.order import TargetStream
from megatron_dr.mcore import cpu, errors, meter
from megatron_dr.mcore.attach import Handle, attach
from megatron_dr.mcore.data import domain_sampling, origins
from megatron_dr.mcore.loop import header, kept_target, target_role
from megatron_dr.mcore.loop.bar import Bar
from megatron_dr.mcore.loop.data_watch import DataWatch
from megatron_dr.mcore.loop.forward import timed, watched
from megatron_dr.mcore.loop.learning_rates import learning_rates
from megatron_dr.mcore.loop.recorder import Recorder
from megatron_dr.mcore.loop.target_role import TargetRole, most_repeated, with_means  # fmt: skip
from megatron_dr.mcore.seams.source import Source, resumes
from megatron_dr.report.gpus import Gpus
from megatron_dr.report.metrics import MetricsFile

_STEPS, _CONSUMED = "megatron_dr_steps", "megatron_dr_consumed_target_samples"
_DIAL = "megatron_dr_dial"
START = {_STEPS: 0, _CONSUMED: 0, _DIAL: None, domain_sampling.STATE: None}


def of_node(args: Namespace) -> Gpus | None:
    """The figures of this node's GPUs, on one rank of it, where metrics are written."""
    if not args.dr_metrics or args.local_rank or cpu.is_enabled():
        return None
    return Gpus(args.dr_metrics)


class TrainingRun:
    """The plugin in one run of Megatron's loop: the handle, the target's streams, the metrics.

    Args:
        dr: with what only the run knows, but for the run's length and the target set's.
        target: as the steps have it; None: no target microbatches in them.
        source: what is trained on, and by which forward step.
        scheduler: Megatron's, of the learning rate.
        watching: what is looked at beside training.
    """

    def __init__(
        self, model: list[Any], optimizer: Any, config: Any, args: Namespace, dr: DRConfig,
        target: TargetConfig | None, source: Source, scheduler: Any, watching: TargetConfig,
    ) -> None:  # fmt: skip
        self.args, self.source, self.watching = args, source, watching
        self.train = self.valid = TargetRole([None] * len(model))
        self.is_test = False
        with errors.agreed():  # before attach, in which ranks wait for one another
            samples, held_out = source.target_samples(), source.validation_samples()
            tested = source.test_samples()
        self._most: TargetSet | None = None
        size = None
        if target is not None:
            self._most, size = most_repeated(source, samples, target)
        number = 1 if target is None else len(target.target_sets)
        dr = dataclasses.replace(
            dr, alpha_steps=args.train_iters, target_size=size, target_sets=number
        )
        self.handle: Handle = attach(model, optimizer, config, dr)
        self.corpora = domain_sampling.of_run(args, dr, self.handle.rows.device)
        last = dist.get_rank() == dist.get_world_size() - 1  # where Megatron logs
        self.file = MetricsFile(args.dr_metrics) if args.dr_metrics and last else None
        self.gpus = of_node(args)
        if target is not None and self._most is not None:
            self.train = target_role.of_steps(source, samples, args, dr, target, len(model))
            target_role.say_sets(samples, target, dr, self._most)
        self.valid, self.tests = target_role.held_out(
            source, held_out, tested, args, self.valid, watching, self.handle.model
        )
        self.data = DataWatch.of(args, (target or watching, watching))
        self.handle.check_batch(get_num_microbatches(), self.train.number)
        self._fresh_validation = True
        self._is_training = False
        self.validations = 0  # sets of this validation so far
        self._iteration: int | None = None
        self._before: tuple[int, Any, Any] = (0, self.train.begins_at(0), None)
        self.general: Any = None  # the general training set, where this rank reads it
        self.step_began, self.bar = 0.0, Bar.of(args)
        if dr.alpha_style == "auto":
            done = args.iteration - getattr(args, _STEPS)  # before the plugin was switched on
            self.handle.dial.rates = learning_rates(scheduler, args.train_iters, done)
        with errors.agreed():
            self.recorder = Recorder.of(args, watching, self.handle)
        self.handle.guard.heard, self.handle.guard.look_up = self._write_bad, self._origins
        source.begin(self.handle)
        if resumes(args):
            kept_target.load(args, self.handle, getattr(args, _STEPS))
        if self.file is not None:
            self.file.begin(args.iteration, header.of(args, self.handle))

    @property
    def steps_done(self) -> int:
        """Iterations of Megatron's loop so far, those before a resume included."""
        return 0 if self._iteration is None else self._iteration + 1

    def is_for(self, model: Any) -> bool:
        first = model[0] if isinstance(model, list) else model
        return first is self.handle.model[0]

    def begin_validation(self) -> str:
        """A pass over one validation set, or the test set, begins: how its line is called."""
        self._fresh_validation = True
        if self.is_test:
            return "test"
        if not self.args.multiple_validation_sets:
            return "validation"
        number, names = self.validations, self.args.validation_set_names
        self.validations += 1
        return f"validation-{names[number] if names else number}"

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Megatron's `train` runs inside; a run that is told to stop before its end leaves it."""
        self._is_training = True
        shown = self.bar.shown(self.args.iteration) if self.bar else contextlib.nullcontext()
        try:
            with shown:
                yield
        except SystemExit as end:
            self._is_training = False
            if not end.code:
                self.all_is_done()
            raise
        finally:
            self._is_training = False
            self.end_record()

    def all_is_done(self) -> None:
        """No checkpoint is being written any more; after training no validation follows either."""
        if not self._is_training:
            self.data.look(self.steps_done)
            if self.file is not None:
                self.file.write("end", self.steps_done, {})

    def _write_bad(self, _: int, records: list[dict[str, Any]]) -> None:
        """Microbatches with bad gradients, to the metrics' file."""
        if self.file is not None:
            for record in records:
                self.file.note("bad gradient", self.steps_done, record)

    def _origins(self, role: str, microbatch: int) -> list[str]:
        """Where the samples of a microbatch of the step under way are from, if that is known."""
        if role == "target":
            stream = next((one for one in self.train.streams if one is not None), None)
            if not isinstance(stream, TargetStream | MixedStream):
                return []
            return stream.origins(self._before[1], microbatch)
        rank = parallel_state.get_data_parallel_rank()
        return origins.of_general(self.args, self.general, microbatch, rank)

    def call(self, stock: Callable[..., Any], schedule: dict[str, Any]) -> Any:
        """A training step, or a validation batch, of Megatron's loop."""
        if not schedule.get("forward_only", False):
            return self._train(stock, schedule)
        if schedule.get("collect_non_loss_data", False):
            return stock(**schedule)
        return self._validate(stock, schedule)

    def skip(self, data_iterator: Any) -> None:
        """An iteration of --iterations-to-skip: general data move on by a step.

        Megatron's own reads on one tensor-parallel rank, for all and in the shape of one sequence
        a sample, and from one iterator; here each rank moves on what it may read from.
        """
        machine = get_rerun_state_machine()
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        if self.corpora is not None:
            self.corpora.reach()
        while machine.should_run_forward_backward(data_iterator):
            for iterator in iterators:
                for _ in range(0 if iterator is None else get_num_microbatches()):
                    next(iterator)

    def of_data(self, train: Any) -> Any:
        """The general training set, as the run needs it."""
        self.general = train
        if self.corpora is not None:
            self.corpora.of_data(train)
        return train if self.recorder is None else self.recorder.of_data(train)

    def log(self, iteration: int, losses: dict[str, Any], rate: Any) -> dict[str, Any]:
        """A training step is logged (collective where it is recorded): its losses as Megatron logs
        them, with the means of several target sets."""
        losses = with_means(losses, self.train.weights)
        if self.file is not None:
            more = {
                "step seconds": time.monotonic() - self.step_began,
                "peak memory bytes": meter.peak_memory(self.handle.rows.device),
            }
            self.file.write("train", iteration, {**losses, "learning rate": rate, **more})
            log = self.handle.log
            if self.handle.dr.log_blocks and log is not None and log.projects:
                self.file.write("blocks", iteration, log.blocks())
        if self.gpus is not None and iteration % self.args.log_interval == 0:
            self.gpus.write(iteration)
        if self.recorder is not None:
            self.recorder.logged(iteration)
        if self.bar is not None:
            self.bar.at(iteration)
        return losses

    def end_record(self) -> None:
        """What was recorded so far is on the disk."""
        if self.recorder is not None:
            self.recorder.flush()

    def save(self, iteration: int) -> None:
        """A checkpoint of this iteration is about to be written."""
        self.source.save(iteration)
        self.data.look(iteration)
        if self.corpora is not None:
            self.corpora.save()
        self.end_record()
        kept_target.save(self.args, iteration, self.handle, getattr(self.args, _STEPS))

    def _validate(self, stock: Callable[..., Any], schedule: dict[str, Any]) -> Any:
        reports = self.source.test() if self.is_test else self.source.validate()
        if reports is not None:
            return reports
        if self.is_test:  # the general role's streams, or the target's in their place
            return self._step(stock, self.valid, 0, schedule)
        if self._fresh_validation:
            self.valid.put(self.valid.begins_at(0))  # every validation sees the same samples
        self._fresh_validation = False
        return self._step(stock, self.valid, self.valid.number, schedule)

    def _train(self, stock: Callable[..., Any], schedule: dict[str, Any]) -> Any:
        args = self.args
        self.step_began = time.monotonic()
        if args.curr_iteration != self._iteration:
            self._iteration = args.curr_iteration
            place = self.train.begins_at(getattr(args, _CONSUMED))
            self._before = (getattr(args, _STEPS), place, getattr(args, _DIAL))
        steps, place, dial = self._before  # Megatron may run an iteration again: the same data
        self.handle.load_state_dict({"steps": steps, "dial": dial})
        schedule = self.source.before_step(stock, schedule, steps)
        if self.recorder is not None:
            schedule = self.recorder.watched(schedule, args.curr_iteration + 1)
        self.train.put(place)
        number = self.train.number if self.handle.target_due else 0
        own = args.micro_batch_size
        try:
            if self.handle.dr.merges_target:  # where Megatron's batch functions look it up
                args.micro_batch_size += self.train.size
            reports = self._step(stock, self.train, number, schedule)
        finally:
            args.micro_batch_size = own
        setattr(args, _STEPS, steps + 1)
        setattr(args, _DIAL, self.handle.state_dict()["dial"])
        setattr(args, _CONSUMED, self.train.after(place) if number else place)
        return self.source.logged(reports)

    def _step(
        self, stock: Callable[..., Any], role: TargetRole, number: int, schedule: dict[str, Any]
    ) -> Any:
        training = not schedule.get("forward_only", False)
        if self.source.forward_step is not None:
            schedule = {**schedule, "forward_step_func": watched(timed(self.source.forward_step))}
        corpora = self.corpora if training else None
        of_step = [] if corpora is None else corpora.begin_step(schedule["num_microbatches"])

        def of_sequences(**call: Any) -> Any:  # what stages send each other
            size = call["micro_batch_size"] * self.handle.dr.sequences
            return stock(**{**call, "micro_batch_size": size})

        reports = self.handle.step(
            of_sequences, target_data_iterator=role.iterators, num_target_microbatches=number,
            target_micro_batch_size=role.size if training else None, domains=of_step,
            target_samples=self._most.batch if self._most and role.sets else None,
            target_sets=role.sets, **schedule,
        )  # fmt: skip
        return reports if corpora is None else corpora.end_step(self.handle.metrics, reports)
