"""Rows inside the layers: a row is one sample, weighed in each layer's backward or at its end.

A step is one schedule call, or two with `passes=2`: the first finds the weights, the second runs
each microbatch again with them.
"""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore import collectives, compat, meter, random_state
from megatron_dr.mcore.layer_rows import halves, support
from megatron_dr.mcore.layer_rows.deferred import Deferred, Replay
from megatron_dr.mcore.layer_rows.estimate import Estimate, relative
from megatron_dr.mcore.layer_rows.factors import Factors, factors
from megatron_dr.mcore.layer_rows.immediate import Immediate, agree
from megatron_dr.mcore.layer_rows.microbatches import Microbatches
from megatron_dr.mcore.layer_rows.notes import NotFinite
from megatron_dr.mcore.layer_rows.path import Mode, SamplePath
from megatron_dr.mcore.layer_rows.places import BatchShape, Place, move, places
from megatron_dr.mcore.layer_rows.taps import taps
from megatron_dr.mcore.layer_rows.weigh import needs_rows
from megatron_dr.mcore.ownership import block_names, owned_parameters
from megatron_dr.mcore.step import schedule
from megatron_dr.mcore.step.log import StepLog
from megatron_dr.mcore.step.roles import MicrobatchRouter
from megatron_dr.mcore.step.rows import Call, Passes
from megatron_dr.mcore.step.schedule import Finalize, Pass
from megatron_dr.projection import UNPROJECTED, block_of


class LayerRows:
    """Samples as rows; see `step.rows.Rows`.

    Attributes:
        thresholds: [B] of the streaming window, NaN where there is none yet.
        untapped: parameters that are not projected.
        sketches: whether any rank scores by sketches.
        coefficients: [n, B, N] of the last step's samples, where they were found at its end.
    """

    def __init__(self, model: list[Any], config: Any, dr: DRConfig) -> None:
        self.model, self.config, self.dr = model, config, dr
        everything = owned_parameters(model, config)
        owned = [o for o in everything if block_of(o.name, dr.blocks) != UNPROJECTED]
        self.untapped = [o.parameter for o in everything if o not in owned]
        support.check(dr, config, owned)
        self.names = block_names(owned, dr.blocks)
        self.device = compat.device()
        self._owned, self._shape, self.places = owned, BatchShape(0, 0, 0), list[Place]()
        self.path, self.sketches = SamplePath(dr, owned), False
        self.coefficients: torch.Tensor | None = None
        blank = torch.full((len(self.names),), float("nan"), dtype=torch.float64)
        self.thresholds = blank.to(self.device)
        # weights found in the backward; else gradients are there only after the call's backwards
        self.hold = not support.is_immediate(dr, owned)
        self.close = taps.install(map(compat.unwrap, model), self.path).close

    # -- life ------------------------------------------------------------------------------------
    @property
    def state(self) -> list[float] | None:
        """The streaming window's thresholds."""
        found: list[float] = self.thresholds.tolist()
        return found if self.dr.window == "streaming" else None

    def load(self, state: Any) -> None:
        """What is no state of these blocks (the run before had others) counts as none."""
        blank = [float("nan")] * len(self.names)
        fits = isinstance(state, list) and len(state) == len(blank)
        self.thresholds.copy_(torch.tensor(state if fits else blank, dtype=torch.float64))

    def kept(self, steps: int) -> dict[str, Any]:
        return {} if self.target_due(steps) else self.path.targets.sharded(self.dr.seed)

    def load_kept(self, path: Path, samples: int, tokens: int) -> bool:
        self._prepare(self._shape_of(samples, 0, tokens))
        return self.path.targets.load(path, self.dr.seed)

    def offload(self) -> int:
        """A target that later steps use, and projections, go to the host."""
        freed = self.path.targets.offload(keep=self.dr.target_refresh > 1)
        return freed + move(self.places, torch.device("cpu"))

    def restore(self) -> None:
        self.path.targets.move(self.device)
        move(self.places, self.device)

    def forget_target(self) -> None:
        self.path.targets.known = False

    # -- a step ----------------------------------------------------------------------------------
    def target_due(self, steps: int) -> bool:
        """Every `target_refresh` steps, and where there is none yet."""
        return steps % self.dr.target_refresh == 0 or not self.path.targets.known

    def check_batch(self, num_general: int, num_target: int) -> None:
        if self.dr.target_pass == "merged" and num_target not in (0, num_general):
            raise ValueError(
                f"--dr-target-pass merged needs as many target microbatches as general ones, not "
                f"{num_target} and {num_general}: change --dr-target-batch-size."
            )
        own = 0 if self.dr.target_pass == "merged" else num_target
        schedule.check_number(self.model, own, num_general)
        if self.dr.target_refresh > 1 or (self.dr.passes == 2 and 0.0 in support.alphas(self.dr)):
            schedule.check_number(self.model, 0, num_general)  # some calls have no target

    def passes(self, call: Call, log: StepLog) -> Passes:
        self.restore()
        overlap = self.model[0].ddp_config.overlap_grad_reduce
        step = _Step(self, call)
        log.width = step.batches.tokens.shape[1]
        self._prepare(step.shape)
        self.path.asks_all = overlap and not self.hold
        self._set_overlap(self.path.asks_all)
        before = self.thresholds.clone()
        try:
            if self.hold:
                yield from step.deferred(log)
            else:
                yield step.immediate(log)
            if self.dr.window == "streaming":
                agree(self.thresholds)
                if log.bad is not None:  # a step that is left out moves nothing
                    self.thresholds.copy_(torch.where(log.bad.spoilt, before, self.thresholds))
        finally:
            step.end()
            self.path.end()
            self._set_overlap(overlap)

    def _set_overlap(self, value: bool) -> None:
        for chunk in self.model:
            chunk.ddp_config.overlap_grad_reduce = value

    def _shape_of(self, samples: int, merged: int, tokens: int) -> BatchShape:
        context = parallel_state.get_context_parallel_world_size()
        return BatchShape(samples, merged, tokens * self.dr.sequences // context)

    def _prepare(self, shape: BatchShape) -> None:
        """Places for microbatches of this shape: in the first step, as `auto` depends on it."""
        if shape == self._shape:
            return
        self._shape = shape
        self.places = places(self._owned, self.names, self.dr, shape, self.model)
        self.path.set_places(self.places)
        own = any(place.score == "sketched" for place in self.places)
        self.sketches = any(collectives.of_all_ranks(own))
        support.announce(self.dr, self.places, self.names, shape.samples, not self.hold)


class _Step:
    """One step's passes."""

    def __init__(self, rows: LayerRows, call: Call) -> None:
        dr, schedule = rows.dr, call.schedule
        self.rows, self.dr, self.path, self.size = rows, dr, rows.path, schedule["micro_batch_size"]
        self.call = call
        # of a step whose gram decides it, nothing is weighed before it is known
        is_late = dr.alpha_style == "auto" and dr.can_choose_alpha
        self.alpha = 0.0 if is_late else float(call.shares(None, halves.lacks(dr, 2, [])).alpha)
        self.batches = Microbatches(call, dr, rows.device)
        merged = self.batches.merged
        self.own = 0 if merged else call.num_target  # target microbatches by themselves
        self.signs = halves.signs(dr, call, merged)
        self.shape = rows._shape_of(self.size, merged, schedule["seq_length"])
        # Megatron waits for the device, too, where it checks gradients
        self.checked = bool(rows.model[0].ddp_config.check_for_nan_in_grad)
        self.step, self.told, self.seen = call.step, False, NotFinite(self.batches.tokens, self.own)
        self.estimate = Estimate(rows.device)
        self.beta: torch.Tensor | float = dr.beta
        self._states: dict[tuple[int, int], Any] | None = None  # random ones, by chunk and number
        self._again = False

    def immediate(self, log: StepLog) -> Pass:
        """Weights inside the backward."""
        found = self._factors(self.own)
        mode = Immediate(
            self.dr, self.path.targets, self.batches, found, self.alpha, self.rows.thresholds, log,
            self.seen, self.estimate,
        )  # fmt: skip
        return self._pass(mode, self.own, self.own > 0, found, lambda: self._tell(log))

    def deferred(self, log: StepLog) -> Passes:
        """Weights at a call's end: then the kept uses are weighed, or a second call runs."""
        found, rows = self._factors(self.own), self.rows
        mode = Deferred(
            self.dr, rows.places, len(rows.names), self.path.targets, self.batches, found,
            self.seen, self.dr.passes == 1, self.signs, self.estimate,
        )  # fmt: skip

        def solve() -> None:
            rows.coefficients, its = mode.solve(self.call.shares, log)
            self.alpha = float(its.alpha)  # as the host waits for the coefficients, too
            self.beta = its.beta
            self._tell(log)
            if mode.keep:
                with meter.part("combine"):
                    mode.write(self._scaled(found))

        if mode.keep:
            yield self._pass(mode, self.own, self.own > 0, found, solve)
            return
        self._states = {}
        yield self._pass(mode, self.own, self.own > 0, found, solve, gradients=False)
        self._again = True
        for parameter in rows.untapped:  # what is not projected has run backward already
            parameter.main_grad.zero_()  # type: ignore[attr-defined]
        own = self.own if self.alpha > 0 else 0
        found = self._factors(own)
        yield self._pass(Replay(self._scaled(found)), own, False, found)

    def _pass(
        self, mode: Mode, own: int, gather: bool, found: Factors,
        at_end: Callable[[], None] = lambda: None, gradients: bool = True,
    ) -> Pass:  # fmt: skip
        """One schedule call.

        Args:
            own: target microbatches that run by themselves, first.
            gather: whether the target's features are gathered from them.
            at_end: what is done after the backwards, before Megatron's own finalize.
            gradients: whether this pass leaves gradients, for Megatron to reduce.
        """
        batches, path = self.batches, self.path
        signs = [] if batches.merged else [sign for (sign,) in self.signs]
        path.targets.begin(gather, found.to_mean, signs)
        target_scale = self.alpha * found.target_scale if gradients else 0.0
        path.begin(mode, own, batches, self.alpha, target_scale)
        target = batches.iterator(of_target=True) if own else None
        router = MicrobatchRouter(self.rows.model, own, len(batches.tokens), target)
        router.enter = functools.partial(self._enter, own)  # type: ignore[method-assign]

        def of_general(stock: Finalize, num_tokens: torch.Tensor | None) -> None:
            if num_tokens is not None:  # Megatron divides by the tokens: the general role's own
                context = parallel_state.get_context_parallel_world_size()
                num_tokens = (batches.tokens.sum() / context).float()
            path.end()
            at_end()
            if gradients:
                share = self.dr.feasible_set().target_share(self.alpha, self.beta)
                stock(num_tokens, share if own else 0.0)

        size = self.size + batches.merged
        changes = {"data_iterator": batches.iterator(), "micro_batch_size": size}
        return Pass(router, of_general, changes, kept=gradients)

    def _tell(self, log: StepLog) -> None:
        """All weights are known: sum up the log, and name what is not finite (collective)."""
        log.sum_over_ranks(needs_rows(self.dr), self.estimate.sums_2)
        if self.rows.sketches:
            log.put("dr sketch error", relative(self.estimate.sums_2))
        self.told = True
        if self.checked and not log.finite:
            self.seen.tell(self.step)
        elif not self.checked:
            log.bad = self.seen.found(log.spoilt)

    def end(self) -> None:
        """After the passes, or in the middle of one that failed."""
        if self.checked and not self.told:
            with contextlib.suppress(RuntimeError):  # of a device that no longer answers
                self.seen.tell_own(self.step)

    def _enter(self, own: int, chunk: int, microbatch: int, backward: bool) -> None:
        """A microbatch begins. What its forward drops out in a second pass is what was scored: that
        pass may have no target, and chunks take turns otherwise, so each forward has a state."""
        if self._states is not None and not backward:
            key = (chunk, microbatch - own)
            if self._again:
                random_state.restore(self._states[key])
            else:
                self._states[key] = random_state.save()
        self.path.enter(chunk, microbatch, backward)

    def _factors(self, own: int) -> Factors:
        per_token = bool(self.rows.config.calculate_per_token_loss)
        return factors(self.batches, own, per_token, self.dr.window == "step")

    def _scaled(self, found: Factors) -> torch.Tensor:
        """The coefficients [n, B, N] in the units of Megatron's buffer."""
        coefficient_nBN = self.rows.coefficients
        assert coefficient_nBN is not None
        scale_n = coefficient_nBN.new_tensor(found.row_scale)
        return coefficient_nBN * (scale_n * found.scale)[:, None, None]
