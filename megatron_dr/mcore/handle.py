"""`attach`: the plugin on a Megatron model; `Handle.step`: one data-regularised step."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_dr.config import DRConfig
from megatron_dr.mcore import compat, finalize, normalisation, notes, row_groups, step_log
from megatron_dr.mcore.choice import choose
from megatron_dr.mcore.dial import AlphaDial
from megatron_dr.mcore.exact_gram import ExactGram
from megatron_dr.mcore.grad_rows import GradRows
from megatron_dr.mcore.layout import Layout
from megatron_dr.mcore.ownership import block_names, owned_parameters
from megatron_dr.mcore.roles import RoleRouter, merge_reports
from megatron_dr.mcore.stopwatch import Stopwatch
from megatron_dr.projection import block_of

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_ATTRIBUTE = "_megatron_dr_handle"


def attach(model: Any, optimizer: Any, config: Any, dr: DRConfig | None = None) -> "Handle":
    """Attach data-regularised training to a Megatron model. Idempotent; call it last in set-up.

    Args:
        model: Megatron's list of DDP-wrapped model chunks.
        optimizer: Megatron's optimizer; it is not touched.
        config: `get_model_config(model[0])`.
        dr: what to project on what.

    Returns:
        A handle: `handle.step(...)` in place of `forward_backward_func(...)`, `handle.detach()`.

    Raises:
        ValueError: an unsupported model, Megatron feature or version, saying what to change.
    """
    dr = dr or DRConfig()
    compat.check_contract(model, config)
    existing: Handle | None = getattr(model[0], _ATTRIBUTE, None)
    if existing is not None:
        if existing.dr == dr:
            return existing
        existing.detach()
    kind = Handle
    if dr.rows == "sample":
        from megatron_dr.mcore.samples.handle import SampleHandle

        kind = SampleHandle
    handle = kind(list(model), optimizer, config, dr)
    setattr(model[0], _ATTRIBUTE, handle)
    return handle


def attached(model: Any) -> "Handle | None":
    """The handle of a model, if one is attached."""
    first = model[0] if isinstance(model, (list, tuple)) else model
    return getattr(first, _ATTRIBUTE, None)


class Handle:
    """The plugin on one model. Use `attach` to make one; it is a context manager that detaches.

    Attributes:
        steps: training steps done (seeds the sketches; part of `state_dict`).
        projection: what the last step did, or None.
        metrics: the last step's values for the log, by name.
    """

    def __init__(
        self, model: list[torch.nn.Module], optimizer: Any, config: Any, dr: DRConfig
    ) -> None:
        check_dial(dr)
        self.model, self.optimizer, self.config, self.dr = model, optimizer, config, dr
        owned = owned_parameters(model, config)
        names = block_names(owned, dr.blocks)
        number = {name: n for n, name in enumerate(names)}
        self.layout = Layout(
            names=names,
            blocks=tuple(number[block_of(o.name, dr.blocks)] for o in owned),
            ranks_per_row=compat.ranks_per_row(),
            row_map=row_groups.row_map_of(dr),
        )
        row_map = self.layout.row_map
        self.rows = GradRows(
            owned, model, row_map.slots, _DTYPES[dr.slot_dtype], row_map.num_targets
        )
        self.source, why = choose(dr, self.rows, self.layout, model)
        self.dial = AlphaDial(dr)
        self.steps = 0
        self.projection: finalize.Projection | None = None
        self.metrics: dict[str, torch.Tensor] = {}
        self._fired = 0
        self._stopwatch = Stopwatch(self.rows.device)
        notes.attached(dr, self.rows, self.layout, why)

    # -- life ------------------------------------------------------------------------------------
    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.detach()

    def detach(self) -> None:
        """Take the plugin off; the rows' buffers go with the handle."""
        self.rows.end_step()
        self._forget()

    def _forget(self) -> None:
        if getattr(self.model[0], _ATTRIBUTE, None) is self:
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
        """Steps done, and what alpha's rule has gathered."""
        return {"steps": self.steps, "dial": self.dial.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.dial.state = state["steps"], state["dial"]

    # -- a step ----------------------------------------------------------------------------------
    @property
    def target_due(self) -> bool:
        """Whether the next step needs target microbatches."""
        return True

    @property
    def on_target_rank(self) -> bool:
        """Whether this rank runs only target microbatches."""
        return self.layout.group < self.layout.row_map.target_groups

    def check_batch(self, num_general: int, num_target: int) -> None:
        """Raise ValueError where a step's microbatches can't make the rows that the set needs."""
        row_groups.check_batch(self.dr, self.layout.row_map, num_general, num_target)

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
        """`forward_backward_func(**schedule)` with the target's microbatches run first.

        Args:
            forward_backward_func: what `get_forward_backward_func()` returned.
            target_data_iterator: as `data_iterator`: one, or a list with one per model chunk.
            num_target_microbatches: target microbatches of this rank in this step; with
                `target_ranks`, of each of those.
            target_micro_batch_size: samples in a target microbatch; only with sample rows may
                they differ from the general ones' number.
            domains: with domain rows, the domain number of each general microbatch of this rank.
            schedule: the schedule's own arguments; `num_microbatches` counts the general ones.

        Returns:
            What the schedule returns, with 'target loss' and 'dr ...' values in the reports.
        """
        num_target = num_target_microbatches
        forward_only = schedule.get("forward_only", False)
        off = self.dr.set == "mean" and self.dr.rows != "domain"
        if num_target == 0 and (forward_only or off):
            return forward_backward_func(**schedule)  # off: Megatron's own, bit for bit
        if forward_only:
            return self._run(forward_backward_func, None, target_data_iterator, num_target,
                             domains, schedule)  # fmt: skip
        self.check_batch(schedule["num_microbatches"], num_target)
        config, saved = self.config, compat.schedule_hooks(self.config)
        try:
            config.no_sync_func = config.grad_sync_func = None
            compat.hold_gradient_sync(self.model)
            self.rows.begin_step(with_target=num_target > 0)
            return self._run(forward_backward_func, saved["finalize_model_grads_func"],
                             target_data_iterator, num_target, domains, schedule)  # fmt: skip
        finally:
            self.rows.end_step()
            for name, value in saved.items():
                setattr(config, name, value)

    def _run(
        self,
        forward_backward_func: Callable[..., Any],
        stock_finalize: Callable[..., Any] | None,
        target_data: Any,
        num_target: int,
        domains: Sequence[int],
        schedule: dict[str, Any],
    ) -> Any:
        num_general = schedule["num_microbatches"]
        training = stock_finalize is not None
        samples = self._target_samples(num_target * schedule.get("micro_batch_size", 1))
        both = not (training and self.layout.row_map.target_groups)
        if not both:  # a rank has one role
            num_target = num_target if self.on_target_rank else 0
            num_general = 0 if self.on_target_rank else num_general
        router = RoleRouter(
            self.model, self.rows if training else None, num_target, num_general, target_data,
            domains, self.layout.row_map,
        )  # fmt: skip
        if training:
            self._fired = 0
            self.config.finalize_model_grads_func = self._finalize(stock_finalize, router, samples)
        reports = forward_backward_func(
            **{
                **schedule,
                "forward_step_func": router.wrap(schedule["forward_step_func"]),
                "num_microbatches": num_target + num_general,
            }
        )
        if training:
            self._check_fired()
            self.steps += 1
        return merge_reports(reports, num_target, self.metrics if training else {}, both)

    def _finalize(
        self, stock: Callable[..., Any] | None, router: RoleRouter, samples: int
    ) -> Callable[..., Any]:
        """The schedule's finalize hook: project, then Megatron's own."""

        def hook(model: Any, num_tokens: torch.Tensor | None = None, *args: Any, **kw: Any) -> None:
            assert stock is not None
            self._fired += 1
            reduced: Any = contextlib.nullcontext()
            if self._fired == 1:
                router.check_complete()
                num_tokens = self._project(router, num_tokens, samples)
                if isinstance(self.source, ExactGram):
                    reduced = self.source.reduced()
            with reduced:
                stock(model, num_tokens, *args, **kw)

        return hook

    def _check_fired(self) -> None:
        if self._fired != 1:
            raise RuntimeError(
                f"the gradient finalize hook ran {self._fired} times in a step, not once: "
                "something replaced config.finalize_model_grads_func in it, or the schedule was "
                "called on another model; call megatron_dr.attach last and use the model's own "
                "configuration."
            )

    @torch.no_grad()
    def _project(
        self, router: RoleRouter, num_tokens: torch.Tensor | None, samples: int
    ) -> torch.Tensor | None:
        """Rows -> Megatron's buffer. Returns the token count that Megatron divides by."""
        self._stopwatch.start()
        row_map = self.layout.row_map
        with_target = row_map.target_groups > 0 or router.num_target > 0
        ratio, role_scale, share_D = normalisation.factors(
            router, row_map, num_tokens is not None, self.rows.device
        )
        if num_tokens is not None:  # Megatron divides by the tokens: the general role's own
            num_tokens = normalisation.general_tokens(router, num_tokens)
        self.rows.bind(0)
        dial = self.dial.of_step(self.steps, samples, with_target)
        self.projection = finalize.project(
            self.source, self.dr, self.layout, row_map.mix(ratio, share_D), self.steps, dial,
            role_scale, self._stopwatch,
        )  # fmt: skip
        if self.model[0].ddp_config.check_for_nan_in_grad:  # Megatron waits for the device too
            notes.not_finite(self.projection, self.layout, self.dr, self.steps)
        self.metrics = step_log.metrics(
            self.projection, self.dr, self._stopwatch, with_target, self.rows.device
        )
        return num_tokens

    def _target_samples(self, per_rank: int) -> int:
        """Target samples of a step over all ranks that run them."""
        ranks: int = parallel_state.get_data_parallel_world_size()
        return per_rank * (self.dr.target_ranks or ranks)


def check_dial(dr: DRConfig) -> None:
    """Raise ValueError where alpha's rule lacks what only the run can say."""
    if dr.alpha_style != "constant" and dr.alpha_steps is None:
        raise ValueError(f"alpha_style {dr.alpha_style!r} needs alpha_steps, the run's length.")
    if dr.alpha_style == "auto" and dr.target_size is None:
        raise ValueError("alpha_style 'auto' needs target_size, the samples of the target set.")
