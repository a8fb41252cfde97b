"""`Handle` with sample rows: weights are found inside the layers' backward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_dr.config import DRConfig
from megatron_dr.mcore import compat
from megatron_dr.mcore.dial import AlphaDial
from megatron_dr.mcore.handle import Handle, check_dial
from megatron_dr.mcore.layout import Layout
from megatron_dr.mcore.ownership import block_names, owned_parameters
from megatron_dr.mcore.roles import MicrobatchRouter, merge_reports
from megatron_dr.mcore.row_map import RowMap
from megatron_dr.mcore.samples import random_state, support, taps
from megatron_dr.mcore.samples.deferred import Deferred, Replay
from megatron_dr.mcore.samples.immediate import Immediate, agree
from megatron_dr.mcore.samples.log import SampleLog
from megatron_dr.mcore.samples.microbatches import Microbatches
from megatron_dr.mcore.samples.path import Mode, SamplePath
from megatron_dr.mcore.samples.places import BatchShape, Place, move, places
from megatron_dr.mcore.samples.units import Units, units
from megatron_dr.mcore.samples.weigh import alpha_of, needs_rows
from megatron_dr.projection import UNPROJECTED, block_of


class SampleHandle(Handle):
    """The layer path on one model; made by `attach` where rows are samples.

    Attributes:
        thresholds: [B] of the streaming window, part of `state_dict`.
        coefficients: [n, B, N] of the last step's samples, where they were found at its end.
    """

    def __init__(
        self, model: list[torch.nn.Module], optimizer: Any, config: Any, dr: DRConfig
    ) -> None:
        check_dial(dr)
        self.model, self.optimizer, self.config, self.dr = model, optimizer, config, dr
        everything = owned_parameters(model, config)
        owned = [o for o in everything if block_of(o.name, dr.blocks) != UNPROJECTED]
        self._untapped = [o.parameter for o in everything if o not in owned]
        support.check(dr, config, owned)
        names = block_names(owned, dr.blocks)
        number = {name: n for n, name in enumerate(names)}
        blocks = tuple(number[block_of(o.name, dr.blocks)] for o in owned)
        self.layout = Layout(names, blocks, compat.ranks_per_row(), RowMap("rank", 1, 1))
        self.device = owned[0].parameter.device if owned else torch.device("cpu")
        self._owned, self._shape, self.places = owned, BatchShape(0, 0, 0), list[Place]()
        self.path = SamplePath(dr, owned)
        self.dial = AlphaDial(dr)
        self.steps = 0
        self.projection = None
        self.metrics: dict[str, torch.Tensor] = {}
        self.coefficients: torch.Tensor | None = None
        self.thresholds = torch.full((len(names),), float("nan"), dtype=torch.float64)
        self.thresholds = self.thresholds.to(self.device)
        self._fired = 0
        self._immediate = support.is_immediate(dr, owned)
        self._undo = []
        for chunk in model:
            self._undo += taps.install(compat.unwrap(chunk), self.path)

    def detach(self) -> None:
        """Take the taps off the layers."""
        for undo in self._undo:
            undo()
        self._undo = []
        self._forget()

    def offload(self) -> int:
        """As `Handle.offload`: a target that later steps use, and projections, go to the host."""
        freed = self.path.targets.offload(keep=self.dr.target_refresh > 1)
        return freed + move(self.places, torch.device("cpu"))

    def restore(self) -> None:
        self.path.targets.move(self.device)
        move(self.places, self.device)

    def state_dict(self) -> dict[str, Any]:
        """Steps done, and the streaming window's thresholds."""
        streams = self.dr.window == "streaming"
        return {"steps": self.steps, "dial": self.thresholds.tolist() if streams else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        if state["dial"] is not None:
            self.thresholds.copy_(torch.tensor(state["dial"], dtype=torch.float64))

    def check_batch(self, num_general: int, num_target: int) -> None:
        """Raise ValueError where a step's microbatches can't make what the set needs."""
        support.check_batch(self.dr, num_general, num_target, not self.target_due)

    # -- a step ----------------------------------------------------------------------------------
    def step(
        self,
        forward_backward_func: Callable[..., Any],
        *,
        target_data_iterator: Any = None,
        num_target_microbatches: int = 0,
        target_micro_batch_size: int | None = None,
        domains: Sequence[int] = (),
        **schedule: Any,
    ) -> Any:
        """As `Handle.step`. Microbatches are dictionaries of tensors [samples, ...], with
        'loss_mask' [samples, tokens].

        Args:
            num_target_microbatches: of this rank; with the target merged, as many as general
                ones; 0 where no target is due.
            target_micro_batch_size: with the target merged, samples in a target microbatch.
        """
        num_target = num_target_microbatches
        if schedule.get("forward_only", False) or (num_target == 0 and self.dr.set == "mean"):
            return super().step(
                forward_backward_func, target_data_iterator=target_data_iterator,
                num_target_microbatches=num_target, **schedule,
            )  # fmt: skip
        self.check_batch(schedule["num_microbatches"], num_target)
        self.restore()
        config, saved = self.config, compat.schedule_hooks(self.config)
        size = schedule["micro_batch_size"]
        batches = Microbatches(
            schedule["data_iterator"], target_data_iterator, schedule["num_microbatches"],
            num_target, (size, target_micro_batch_size or size), self._merged, self.device,
            schedule["seq_length"] if self.dr.packed else None,
        )  # fmt: skip
        overlap = self.model[0].ddp_config.overlap_grad_reduce
        try:
            if not self._immediate:  # gradients are there only after the schedule's backwards
                config.no_sync_func = config.grad_sync_func = None
                compat.hold_gradient_sync(self.model)
                self._set_overlap(False)
            return self._train(forward_backward_func, batches, num_target, schedule,
                               saved["finalize_model_grads_func"])  # fmt: skip
        finally:
            self.path.end()
            self._set_overlap(overlap)
            for name, value in saved.items():
                setattr(config, name, value)

    @property
    def target_due(self) -> bool:
        """Every `target_refresh` steps, and after a resume."""
        return self.steps % self.dr.target_refresh == 0 or not self.path.targets.known

    def _set_overlap(self, value: bool) -> None:
        for chunk in self.model:
            chunk.ddp_config.overlap_grad_reduce = value

    @property
    def _merged(self) -> bool:
        return self.dr.target_pass == "merged"

    def _train(
        self, function: Callable[..., Any], batches: Microbatches, num_target: int,
        schedule: dict[str, Any], stock: Callable[..., Any],
    ) -> Any:  # fmt: skip
        dr, alpha, log = self.dr, alpha_of(self.dr, self.steps), SampleLog(needs_rows(self.dr))
        merged = batches.target_tokens.shape[1] if self._merged else 0
        own = 0 if self._merged else num_target
        context = parallel_state.get_context_parallel_world_size()
        samples = schedule["micro_batch_size"]
        length = schedule["seq_length"] * dr.sequences // context
        shape = BatchShape(samples, merged, length)
        self._prepare(shape)
        found = self._units(batches, own)
        call = _Call(function, batches, merged, schedule, alpha)
        if self._immediate:
            scale = [found.scale * s for s in found.row_scale]
            mode: Mode = Immediate(
                dr, self.path.targets, batches.tokens, batches.counts, found.ratio, merged, scale,
                alpha, self.thresholds, log.add,
            )  # fmt: skip
            reports = self._run_pass(call, mode, own, own > 0, found, stock)
        else:
            deferred = Deferred(
                dr, self.places, len(self.layout.names), self.path.targets, batches.tokens,
                batches.counts, found.ratio, found.row_scale, merged, keep=dr.passes == 1,
            )  # fmt: skip

            def solve(model: Any = None, *args: Any, **kwargs: Any) -> None:
                solutions, self.coefficients = deferred.solve(alpha)
                for solved in solutions:
                    log.add(None, solved)

            def solve_and_write(model: Any, *args: Any, **kwargs: Any) -> None:
                solve()
                assert self.coefficients is not None
                deferred.write(self._scaled(self.coefficients, found))
                stock(model, *args, **kwargs)

            if dr.passes == 1:
                reports = self._run_pass(call, deferred, own, own > 0, found, solve_and_write)
            else:
                random = random_state.save()
                self._run_pass(call, deferred, own, own > 0, found, solve, gradients=False)
                random_state.restore(random)
                for parameter in self._untapped:  # what is not projected ran backward already
                    parameter.main_grad.zero_()  # type: ignore[attr-defined]
                own = own if alpha > 0 else 0
                found = self._units(batches, own)
                assert self.coefficients is not None
                replay = Replay(self._scaled(self.coefficients, found))
                reports = self._run_pass(call, replay, own, False, found, stock)
        self.steps += 1
        if dr.window == "streaming":
            agree(self.thresholds)
        self.metrics = log.values(self.device)
        return merge_reports(reports, own, self.metrics, both=True)

    def _prepare(self, shape: BatchShape) -> None:
        """Places for microbatches of this shape: in the first step, as `auto` depends on it."""
        if shape == self._shape:
            return
        self._shape = shape
        self.places = places(self._owned, self.layout.names, self.dr, shape, self.model)
        self.path.set_places(self.places)
        support.say(self.dr, self.places, self.layout.names, self._immediate)

    def _run_pass(
        self, call: "_Call", mode: Mode, own: int, gather: bool, found: Units,
        finalize: Callable[..., Any], gradients: bool = True,
    ) -> Any:  # fmt: skip
        """One schedule call.

        Args:
            own: target microbatches that run by themselves, first.
            gather: whether the target's features are gathered from them.
            finalize: what the schedule's finalize hook does.
            gradients: whether the target's own gradient enters the update in this pass.
        """
        batches, alpha = call.batches, call.alpha
        self.path.targets.begin(gather, found.to_mean)
        target_scale = alpha * found.target_scale if gradients else 0.0
        self.path.begin(mode, own, call.merged, alpha, target_scale, batches.packs)
        data = batches.iterator()
        router = _Router(self.path, self.model, own, len(batches.tokens),
                         batches.iterator(of_target=True) if own else None)  # fmt: skip
        self._fired = 0

        def hook(model: Any, num_tokens: torch.Tensor | None = None, *args: Any, **kw: Any) -> None:
            self._fired += 1
            router.check_complete()
            if num_tokens is not None:  # Megatron divides by the tokens: the general role's own
                context = parallel_state.get_context_parallel_world_size()
                num_tokens = (batches.tokens.sum() / context).float()
            with torch.no_grad():
                finalize(model, num_tokens, *args, **kw)

        self.config.finalize_model_grads_func = hook
        size = call.schedule["micro_batch_size"] + call.merged
        reports = call.function(
            **{
                **call.schedule,
                "data_iterator": data,
                "forward_step_func": router.wrap(call.schedule["forward_step_func"]),
                "num_microbatches": own + len(batches.tokens),
                "micro_batch_size": size,
            }
        )
        self.path.end()
        self._check_fired()
        return reports

    def _units(self, batches: Microbatches, own: int) -> Units:
        per_token = bool(self.config.calculate_per_token_loss)
        return units(batches, own, self._merged, per_token, self.dr.window)

    def _scaled(self, coefficient_nBN: torch.Tensor, found: Units) -> torch.Tensor:
        scale_n = torch.tensor(found.row_scale, dtype=torch.float64, device=self.device)
        return coefficient_nBN * (scale_n * found.scale)[:, None, None]


@dataclass(frozen=True)
class _Call:
    """What is the same in both passes of a step."""

    function: Callable[..., Any]
    batches: Microbatches
    merged: int
    schedule: dict[str, Any]
    alpha: float


class _Router(MicrobatchRouter):
    """Tells the path which microbatch's backward begins."""

    def __init__(self, path: SamplePath, *rest: Any) -> None:
        super().__init__(*rest)
        self._path = path

    def enter(self, chunk: int, microbatch: int, backward: bool) -> None:
        if backward:
            self._path.enter(chunk, microbatch)
