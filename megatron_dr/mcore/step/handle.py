"""`Handle`: the plugin on one model: its life, and `step`, one data-regularised step."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore import progress, stall
from megatron_dr.mcore.meter import Meter
from megatron_dr.mcore.step import books
from megatron_dr.mcore.step import schedule as schedules
from megatron_dr.mcore.step.alpha import Alpha, Shares
from megatron_dr.mcore.step.bad import Guard
from megatron_dr.mcore.step.log import StepLog
from megatron_dr.mcore.step.roles import MicrobatchRouter, merge_reports
from megatron_dr.mcore.step.rows import Call, Rows
from megatron_dr.mcore.step.sets import TargetSets, Weighing, tokens_ahead

_ATTRIBUTE = "_megatron_dr_handle"


def attached(model: Any) -> "Handle | None":
    """The handle of a model, if one is attached."""
    first = model[0] if isinstance(model, (list, tuple)) else model
    return getattr(first, _ATTRIBUTE, None)


class Handle:
    """The plugin on one model. Use `attach` to make one; it is a context manager that detaches.

    Args:
        rows: makes the kind of rows, of the model, its configuration and `dr`.

    Attributes:
        dr: what is projected on what, and `asked`: before `auto` was settled.
        dial: alpha and beta of each step; a host sets its `rates`.
        rows: what differs between kinds of rows.
        guard: keeps what is not finite from the optimizer.
        steps: training steps done (seeds the sketches; part of `state_dict`).
        log: what the last step did, by block, or None.
        keeps: whether the next steps' logs keep each row's weight.
        metrics: the last step's values for the log, by name.
    """

    def __init__(
        self, model: list[Any], optimizer: Any, config: Any, dr: DRConfig,
        rows: Callable[[list[Any], Any, DRConfig], Rows],
    ) -> None:  # fmt: skip
        self.dial = Alpha(dr)
        self.model, self.optimizer, self.config = model, optimizer, config
        self.dr = self.asked = dr
        self.rows = rows(model, config, dr)
        self.steps = 0
        self.log: StepLog | None = None
        self.keeps = False
        self.metrics: dict[str, torch.Tensor] = {}
        self._meter = Meter(self.rows.device)
        self.guard = Guard(
            dr.on_bad_gradient, optimizer, model[0].ddp_config, bool(config.fp16),
            self.rows.forget_target,
        )  # fmt: skip
        stall.begin(dr.stall_seconds)
        setattr(model[0], _ATTRIBUTE, self)

    # -- life ------------------------------------------------------------------------------------
    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.detach()

    def detach(self) -> None:
        """Take the plugin off; the rows' buffers go with the handle. Safe to call twice."""
        self.rows.close()
        self.guard.close()
        stall.end()
        if attached(self.model) is self:
            delattr(self.model[0], _ATTRIBUTE)

    def offload(self) -> int:
        """Between two steps: free what the plugin keeps on the device; how many bytes.

        Megatron's own gradient buffers are freed by each model chunk's `offload_grad_buffers`,
        before or after this. Safe to call twice. The next step calls `restore` itself, and
        computes what it would have computed.
        """
        return self.rows.offload()

    def restore(self) -> None:
        """Take the memory again that the next step needs. Safe to call twice."""
        self.rows.restore()

    def state_dict(self) -> dict[str, Any]:
        """Steps done, and as `dial` what alpha's rule or the rows have gathered: at most one of
        them does."""
        own = self.rows.state
        return {"steps": self.steps, "dial": self.dial.state if own is None else own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        if self.rows.state is None:
            self.dial.load(state["dial"])
        else:
            self.rows.load(state["dial"])

    # -- a step ----------------------------------------------------------------------------------
    @property
    def target_due(self) -> bool:
        """Whether the next step needs target microbatches."""
        return self.rows.target_due(self.steps)

    def check_batch(self, num_general: int, num_target: int) -> None:
        """Raise ValueError where a step's microbatches can't make the rows that the set needs."""
        if num_target == 0 and self.dr.needs_target and self.target_due:
            raise ValueError(
                f"--dr-set {self.dr.set} needs target data: give a target batch "
                "(--dr-target-data), or --dr-set mean."
            )
        self.rows.check_batch(num_general, num_target)

    def step(
        self, forward_backward_func: Callable[..., Any], *, target_data_iterator: Any = None,
        num_target_microbatches: int = 0, target_micro_batch_size: int | None = None,
        target_samples: int | None = None, target_sets: TargetSets | None = None,
        domains: Sequence[int] = (), **schedule: Any,
    ) -> Any:  # fmt: skip
        """`forward_backward_func(**schedule)` with the target's microbatches run first.

        Args:
            forward_backward_func: what `get_forward_backward_func()` returned.
            target_data_iterator: as `data_iterator`: one, or a list with one per model chunk.
            num_target_microbatches: target microbatches of this rank in this step; with
                `target_ranks`, of each of those; with sample rows whose target is merged, as many
                as general ones; 0 where no target is due.
            target_micro_batch_size: samples in a target microbatch; only with sample rows may
                they differ from the general ones' number.
            target_samples: of this step over all ranks, where microbatches are packs; none:
                microbatches times their size. Only alpha's rule counts them.
            target_sets: of which set each target microbatch is, where there are several: t is the
                mean of the sets' gradients by their weights. Of validation, for the log alone. Not
                with sample rows whose target is merged.
            domains: with domain rows, the domain number of each general microbatch of this rank.
            schedule: the schedule's own arguments; `num_microbatches` counts the general ones.
                With sample rows a microbatch is a dictionary of tensors [samples, ...], with
                'loss_mask' [samples, tokens].

        Returns:
            What the schedule returns, with 'target loss' and 'dr ...' values in the reports; of
            several sets 'target loss NAME' of each.
        """
        forward_only = schedule.get("forward_only", False)
        plain = not self.dr.feasible_set().reads_target and not self.dr.row_kind.named
        if not forward_only:
            self.guard.begin()
        if num_target_microbatches == 0 and (forward_only or plain):
            return forward_backward_func(**schedule)  # off: Megatron's own, bit for bit
        size = target_micro_batch_size or schedule.get("micro_batch_size", 1)
        ranks = self.dr.target_ranks or parallel_state.get_data_parallel_world_size()
        samples = target_samples or num_target_microbatches * size * ranks
        log = StepLog(self.rows.names, self.rows.device, self.keeps)

        def shares(gram_BRR: torch.Tensor | None, *more: Any) -> Shares:
            found = self.dial.shares(self.steps, samples, gram_BRR, *more)
            for name, value in found.log.items():
                log.put(name, value)
            return found

        call = Call(
            forward_backward_func, schedule, target_data_iterator, num_target_microbatches, size,
            domains, self.steps, shares, target_sets if num_target_microbatches else None,
        )  # fmt: skip
        if forward_only:
            return self._validate(call)
        self.check_batch(call.num_general, call.num_target)
        log.name_bad = lambda: self.guard.name(self.steps, log.bad)
        return self._train(call, log)

    def _validate(self, call: Call) -> Any:
        """Both roles' microbatches, forward alone."""
        router = MicrobatchRouter(self.model, call.num_target, call.num_general, call.target_data)
        forward_step = router.wrap(call.schedule["forward_step_func"])
        number = call.num_target + call.num_general
        changes = {"forward_step_func": forward_step, "num_microbatches": number}
        with books.opened(self.model, router):
            reports = call.function(**{**call.schedule, **changes})
        return merge_reports(reports, call.num_target, {}, True, call.sets)

    def _weighing(self, call: Call) -> tuple[Call, Weighing | None]:
        """What several target sets need, and the step with its data as they were (collective)."""
        if call.sets is None:
            return call, None
        tokens_n, data, ranks = None, call.target_data, self.dr.target_ranks
        if self.config.calculate_per_token_loss:
            runs = not ranks or parallel_state.get_data_parallel_rank() < ranks
            tokens_n, again = tokens_ahead(
                data if runs else None, call.num_target, self.rows.device
            )
            data = again if runs else data
        scale_n = call.sets.scales(tokens_n, self.rows.device)
        return dataclasses.replace(call, target_data=data), Weighing(scale_n)

    def _train(self, call: Call, log: StepLog) -> Any:
        call, weighing = self._weighing(call)
        with (
            stall.told_who_is_gone(),
            progress.in_step(call.step),
            self._meter.running(),
            schedules.ours(self.model, self.config, self.rows.hold),
            contextlib.closing(self.rows.passes(call, log)) as passes,
        ):
            for one in passes:
                one.router.weighing = weighing
                reports = schedules.run(call.function, call.schedule, one, self.config)
        self.steps += 1
        if log.bad is not None and self.dr.on_bad_gradient != "stop":
            log.put("dr bad target", log.bad.target.float())
            log.put("dr bad general", log.bad.general.float())
        for part, milliseconds in self._meter.milliseconds.items():
            log.put(f"dr {part} ms", milliseconds)
        log.put("dr bytes", float(self._meter.bytes))
        self.log, self.metrics = log, log.metrics()
        self.guard.found(self.steps - 1, log.bad)
        return merge_reports(reports, one.router.num_target, self.metrics, one.both, call.sets)
