"""`attach`: the plugin on a Megatron model; `Handle.step`: one data-regularised step."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dr.config import DRConfig
from megatron_dr.mcore import compat, finalize, notes
from megatron_dr.mcore.grad_rows import GradRows
from megatron_dr.mcore.ownership import block_table, owned_parameters
from megatron_dr.mcore.roles import RoleRouter, merge_reports
from megatron_dr.mcore.stopwatch import Stopwatch

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
    handle = Handle(list(model), optimizer, config, dr)
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
        self.model, self.optimizer, self.config, self.dr = model, optimizer, config, dr
        owned = owned_parameters(model, config)
        table = block_table(owned, dr.blocks)
        self.layout = finalize.Layout(
            blocks=tuple(table.number(o, dr.blocks) for o in owned),
            num_blocks=len(table.names),
            offsets=table.offsets,
            exact_size=table.size,
            ranks_per_row=compat.ranks_per_row(),
        )
        self.block_names = table.names
        self.rows = GradRows(owned, dr.num_slots, _DTYPES[dr.slot_dtype])
        self.steps = 0
        self.projection: finalize.Projection | None = None
        self.metrics: dict[str, torch.Tensor] = {}
        self._fired = 0
        self._stopwatch = Stopwatch(owned[0].parameter.device)
        notes.attached(dr, self.rows, self.layout)

    # -- life ------------------------------------------------------------------------------------
    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.detach()

    def detach(self) -> None:
        """Take the plugin off; the rows' buffers go with the handle."""
        self.rows.end_step()
        if getattr(self.model[0], _ATTRIBUTE, None) is self:
            delattr(self.model[0], _ATTRIBUTE)

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]

    # -- a step ----------------------------------------------------------------------------------
    @property
    def num_rows(self) -> int:
        """M: rows of all ranks in a step."""
        return self.layout.num_row_groups * self.dr.num_slots

    def check_batch(self, num_general: int, num_target: int) -> None:
        """Raise ValueError where a step's microbatches can't make the rows that the set needs."""
        dr, rows = self.dr, self.num_rows
        if num_target == 0 and dr.needs_target():
            raise ValueError(
                f"--dr-set {dr.set} needs target data: give a target batch (--dr-target-data), "
                "or --dr-set mean."
            )
        if num_general % dr.num_slots:
            raise ValueError(
                f"{num_general} general microbatches per rank can't be divided into {dr.num_slots} "
                "slots: change --dr-slots, or --global-batch-size."
            )
        if dr.set in ("topk", "capped") and 1 < rows < 1.0 / dr.fraction - 1e-9:
            raise ValueError(
                f"--dr-set {dr.set} with fraction {dr.fraction} needs at least "
                f"{int(1 / dr.fraction + 0.999)} rows, but a step has {rows}: raise --dr-slots, "
                "the data-parallel size or --dr-fraction."
            )

    def step(
        self,
        forward_backward_func: Callable[..., Any],
        *,
        target_data_iterator: Any = None,
        num_target_microbatches: int = 0,
        **schedule: Any,
    ) -> Any:
        """`forward_backward_func(**schedule)` with the target's microbatches run first.

        Args:
            forward_backward_func: what `get_forward_backward_func()` returned.
            target_data_iterator: as `data_iterator`: one, or a list with one per model chunk.
            num_target_microbatches: target microbatches of this rank in this step.
            schedule: the schedule's own arguments; `num_microbatches` counts the general ones.

        Returns:
            What the schedule returns, with 'target loss' and 'dr ...' values in the reports.
        """
        forward_only = schedule.get("forward_only", False)
        if num_target_microbatches == 0 and (forward_only or self.dr.set == "mean"):
            return forward_backward_func(**schedule)  # off: Megatron's own, bit for bit
        if forward_only:
            return self._run(forward_backward_func, None, target_data_iterator,
                             num_target_microbatches, schedule)  # fmt: skip
        self.check_batch(schedule["num_microbatches"], num_target_microbatches)
        config, saved = self.config, {}
        for name in ("finalize_model_grads_func", "no_sync_func", "grad_sync_func"):
            saved[name] = getattr(config, name)
        if saved["finalize_model_grads_func"] is None:
            raise RuntimeError(
                "config.finalize_model_grads_func is not set, so Megatron would not reduce "
                "gradients: set it to finalize_model_grads before the step."
            )
        try:
            config.no_sync_func = config.grad_sync_func = None
            compat.hold_gradient_sync(self.model)
            self.rows.begin_step(with_target=num_target_microbatches > 0)
            return self._run(forward_backward_func, saved["finalize_model_grads_func"],
                             target_data_iterator, num_target_microbatches, schedule)  # fmt: skip
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
        schedule: dict[str, Any],
    ) -> Any:
        num_general = schedule["num_microbatches"]
        training = stock_finalize is not None
        router = RoleRouter(
            self.model, self.rows if training else None, num_target, num_general, target_data
        )
        if training:
            self._fired = 0
            self.config.finalize_model_grads_func = self._finalize(stock_finalize, router)
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
        return merge_reports(reports, num_target, self.metrics if training else {})

    def _finalize(self, stock: Callable[..., Any] | None, router: RoleRouter) -> Callable[..., Any]:
        """The schedule's finalize hook: project, then Megatron's own."""

        def hook(model: Any, num_tokens: torch.Tensor | None = None, *args: Any, **kw: Any) -> None:
            assert stock is not None
            self._fired += 1
            if self._fired == 1:
                router.check_complete()
                num_tokens = self._project(router, num_tokens)
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
    def _project(self, router: RoleRouter, num_tokens: torch.Tensor | None) -> torch.Tensor | None:
        """Rows -> Megatron's buffer. Returns the token count that Megatron divides by."""
        self._stopwatch.start()
        n_t, n_g = router.num_target, router.num_general
        device = self.rows.view(0, 0).device
        if num_tokens is None:  # each microbatch was divided by n_t + n_g
            ratio = torch.tensor(n_g / n_t if n_t else 0.0, dtype=torch.float64, device=device)
            role_scale = (n_t + n_g) / n_g
        else:  # Megatron divides by the tokens: the general role's own
            general, target = self._count_tokens(router, device)
            ratio, role_scale = general / target.clamp(min=1), 1.0
            num_tokens = _as_tensor(router.tokens[False], num_tokens)
        self.rows.bind(0)
        self.projection = finalize.project(
            self.rows, self.dr, self.layout, self.steps, ratio, role_scale, n_t > 0
        )
        if self.model[0].ddp_config.check_for_nan_in_grad:  # Megatron waits for the device too
            notes.not_finite(self.projection, self.dr.num_slots, self.layout, self.steps)
        self.metrics = finalize.metrics(self.projection) if n_t else {}
        self._stopwatch.stop()
        cost = {"ms": self._stopwatch.milliseconds, "bytes": self.projection.wire_bytes}
        for name, value in cost.items():
            self.metrics[f"dr {name}"] = torch.tensor(float(value), device=device)
        return num_tokens

    def _count_tokens(self, router: RoleRouter, device: torch.device) -> torch.Tensor:
        """Tokens of the general and the target role over all data ranks, float64 [2]."""
        counts = torch.stack(
            [_as_tensor(n, torch.zeros([], device=device)).double().to(device)
             for n in router.tokens]
        )  # fmt: skip
        if parallel_state.get_tensor_model_parallel_rank() != 0:
            counts.zero_()  # each tensor-parallel rank of the last stage has counted the same
        dist.all_reduce(counts, group=compat.model_group())
        dist.all_reduce(counts, group=compat.data_group())
        return counts


def _as_tensor(value: torch.Tensor | int, like: torch.Tensor) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.to(like.dtype)
    return torch.full_like(like, value)


