"""One place where a schedule call is made ours: on a training step's passes, and where else
gradients are needed before Megatron reduces them.

Inside `ours` no gradient is reduced before the finalize hook; `run` is one schedule call, in which
that hook is ours and fires exactly once. Megatron's own hooks and flags are put back.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from megatron_dr.mcore.compat import Chunk, Schedule, bucket_groups
from megatron_dr.mcore.step import books
from megatron_dr.mcore.step.roles import MicrobatchRouter

_HOOKS = ("finalize_model_grads_func", "no_sync_func", "grad_sync_func")
# Megatron's own finalize of the call under way, of the tokens that it divides by and of the
# target's share of the update
Finalize = Callable[[torch.Tensor | None, torch.Tensor | float], None]


@dataclass(frozen=True)
class Pass:
    """One schedule call of ours.

    Attributes:
        router: knows each microbatch's role; target microbatches come first.
        finalize: what the schedule's finalize hook does, given Megatron's own, and the tokens that
            Megatron counted (None without a per-token loss).
        changes: the schedule's arguments that differ from the host's.
        both: whether this rank runs both roles.
        ranks: data ranks over those that run this rank's role; 1 where each runs both.
        kept: whether what its forwards keep beside gradients is the step's (`books`).
    """

    router: MicrobatchRouter
    finalize: Callable[[Finalize, torch.Tensor | None], None]
    changes: dict[str, Any] = field(default_factory=dict)
    both: bool = True
    ranks: float = 1.0
    kept: bool = True


def group_size(model: Sequence[torch.nn.Module]) -> int:
    """How many microbatches a model chunk takes before the next chunk of the stage does. Any
    multiple can be run in one call."""
    if len(model) == 1:
        return 1
    return int(get_model_config(model[0]).microbatch_group_size_per_vp_stage)


def check_number(
    model: Sequence[torch.nn.Module], num_target: int, num_general: int, flag: str = ""
) -> None:
    """Raise ValueError where an interleaved schedule can't run so many microbatches in one call: a
    last group of fewer than there are stages would leave stages waiting.

    Args:
        flag: what to change, but for that of the role's batch.
    """
    group, number = group_size(model), num_target + num_general
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    if len(model) == 1 or (number >= group and not 0 < number % group < stages):
        return
    more = "" if group == stages else f", or leave a remainder of at least {stages}"
    flag = flag or ("--dr-target-batch-size" if num_target else "--global-batch-size")
    raise ValueError(
        f"an interleaved pipeline of {stages} stages can't run {num_target} target and "
        f"{num_general} general microbatches together: their number must be a multiple of "
        f"{group}{more}, so change {flag}."
    )


@contextmanager
def ours(model: list[Chunk], config: Any, hold: bool = True) -> Iterator[None]:
    """Schedule calls on the model are ours inside; Megatron's hooks are put back.

    Args:
        hold: whether no gradient may be reduced before the finalize hook.

    Raises:
        RuntimeError: gradients would not be reduced.
    """
    saved = {name: getattr(config, name) for name in _HOOKS}
    flags = [(g, g.is_first_batch, g.is_last_microbatch) for g in bucket_groups(model)]
    if saved["finalize_model_grads_func"] is None:
        raise RuntimeError(
            "config.finalize_model_grads_func is not set, so Megatron would not reduce gradients: "
            "set it to finalize_model_grads before the step."
        )
    try:
        if hold:
            config.no_sync_func = config.grad_sync_func = None
            _hold_reductions(model)
        yield
    finally:
        for name, value in saved.items():
            setattr(config, name, value)
        for group, first, last in flags:
            group.is_first_batch, group.is_last_microbatch = first, last


def _hold_reductions(model: list[Chunk]) -> None:
    """Keep `overlap_grad_reduce` from reducing a bucket before its rows are combined: without
    is_last_microbatch none counts as ready, and with is_first_batch finalize launches what is left.
    """
    for group in bucket_groups(model):
        group.is_last_microbatch = False
        group.is_first_batch = True


def run(
    function: Schedule, schedule: dict[str, Any], one: Pass, config: Any
) -> list[dict[str, torch.Tensor]]:
    """A schedule call, inside `ours`: its reports.

    Raises:
        RuntimeError: microbatches did not all run, or the finalize hook did not fire once.
    """
    router, stock, fired = one.router, config.finalize_model_grads_func, 0

    def hook(model: Any, num_tokens: torch.Tensor | None = None, *args: Any, **kw: Any) -> None:
        nonlocal fired

        def finalize(tokens: torch.Tensor | None, share: torch.Tensor | float) -> None:
            of_roles.settle(share, one.ranks)
            stock(model, tokens, *args, **kw)

        fired += 1
        if fired == 1:
            router.check_complete()
            with torch.no_grad():
                one.finalize(finalize, num_tokens)

    config.finalize_model_grads_func, model = hook, schedule["model"]
    chunks = list(model) if isinstance(model, (list, tuple)) else [model]
    try:
        with books.opened(chunks, router, one.kept) as of_roles:
            reports = function(
                **{
                    **schedule, **one.changes,
                    "forward_step_func": router.wrap(schedule["forward_step_func"]),
                    "num_microbatches": router.num_target + router.num_general,
                }
            )  # fmt: skip
    finally:
        config.finalize_model_grads_func = stock
    if fired != 1:
        raise RuntimeError(
            f"the gradient finalize hook ran {fired} times in a step, not once: something replaced "
            "config.finalize_model_grads_func in it, or the schedule was called on another model; "
            "call megatron_dr.attach last and use the model's own configuration."
        )
    return reports
