"""Steps of a mixture of experts, and all that Megatron keeps of them beside gradients."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

import megatron_dr
from megatron_dr import DRConfig

from . import _megatron, _samples
from ._data import Layout

STEPS = 2
LOGGED = {
    "aux_loss": "load_balancing_loss", "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}  # fmt: skip
BIAS = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
ROUTERS: dict[str, dict[str, Any]] = {
    "every loss": {
        "moe_router_load_balancing_type": list(LOGGED), "moe_aux_loss_coeff": [0.3, 0.2, 0.1],
        "moe_z_loss_coeff": 0.1,
    },
    "sequence loss": {
        "moe_router_load_balancing_type": "seq_aux_loss", "moe_z_loss_coeff": 0.1
    },
    "expert bias": BIAS,
    "quantiles": {
        "moe_router_load_balancing_type": "quantile_balancing", "moe_aux_loss_coeff": 0.0,
    },
    "forced": {
        "moe_router_force_load_balancing": True, "moe_input_jitter_eps": 0.1, "hidden_dropout": 0.2,
    },
}  # fmt: skip
COUNTS = ("local_tokens_per_expert", "qb_beta_accum", "qb_beta_count")


@dataclass(frozen=True)
class Run:
    """Steps of a case.

    Attributes:
        router: of `ROUTERS`.
        dr: what is attached; None: Megatron alone.
        role: whose microbatches are the general ones.
        numbers: general and target microbatches of a rank.
    """

    router: str
    dr: DRConfig | None = None
    role: str = "general"
    numbers: tuple[int, int] = (2, 2)
    lr: float = _megatron.LEARNING_RATE


def many(layout: Layout, runs: list[Run]) -> list[dict[str, torch.Tensor]]:
    """On a rank: what `train` gives of each run, one after the other."""
    _megatron.initialize(layout)
    stock, found = _megatron.transformer_config, []
    for run in runs:
        _megatron.transformer_config = _with(run.router)
        torch.manual_seed(1)
        try:
            found.append(train(layout, run))
        finally:
            _megatron.transformer_config = stock
    return found


def _with(router: str) -> Any:
    """Megatron's configuration of the tests, small, with this router."""
    stock = _megatron.transformer_config
    values = {"moe_aux_loss_coeff": 0.3, **ROUTERS[router]}

    def config(layout: Layout) -> Any:
        made = stock(layout)
        made.num_layers = 2 * (layout.vpp or 1)
        for name, value in values.items():
            setattr(made, name, value)
        return made

    return config


def train(layout: Layout, run: Run) -> dict[str, torch.Tensor]:
    """STEPS steps: what each logged and counted, and at last the weights, all buffers of the model
    and the random state."""
    model, optimizer, config = _megatron.build(layout)
    _megatron.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    for group in optimizer.param_groups:
        group["lr"] = run.lr
    found, finalize, step = dict[str, torch.Tensor](), config.finalize_model_grads_func, 0

    def counted(*args: Any, **kwargs: Any) -> None:
        found.update((f"step {step} {name}", count) for name, count in _counts(model))
        finalize(*args, **kwargs)

    config.finalize_model_grads_func = counted
    handle = megatron_dr.attach(model, optimizer, config, run.dr) if run.dr else None
    for step in range(STEPS):
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reports = _step(layout, run, model, handle, step)
        found |= {f"step {step} {name}": value for name, value in _logged(reports, config).items()}
        found[f"step {step} norm"] = torch.as_tensor(optimizer.step()[1])
    for number, chunk in enumerate(model):
        for name, value in [*chunk.named_parameters(), *chunk.named_buffers()]:
            found[f"chunk {number} {name}"] = value.detach().clone()
    found["random state"] = torch.get_rng_state()
    if handle is not None:
        handle.detach()
    return found


def _counts(model: list[Any]) -> list[tuple[str, torch.Tensor]]:
    """What Megatron's finalize reads."""
    named = ((n, b) for chunk in model for n, b in chunk.named_buffers())
    return [(n, b.clone()) for n, b in named if n.endswith(COUNTS)]


def _step(layout: Layout, run: Run, model: list[Any], handle: Any, step: int) -> Any:
    rank, function = parallel_state.get_data_parallel_rank(), get_forward_backward_func()
    roles = zip((run.role, "target"), (rank - layout.target_ranks, rank), run.numbers, strict=True)
    general, target = (
        [iter([_samples.batch(layout, role, step, of, n, 2) for n in range(number)]) for _ in model]
        for role, of, number in roles
    )
    schedule = dict(
        forward_step_func=_samples.forward_step, model=model if layout.vpp else model[0],
        data_iterator=general if layout.vpp else general[0], num_microbatches=run.numbers[0],
        seq_length=_samples._data.LENGTH, micro_batch_size=2, forward_only=False,
    )  # fmt: skip
    if handle is None:
        return function(**schedule)
    return handle.step(
        function, target_data_iterator=target if layout.vpp else target[0],
        num_target_microbatches=run.numbers[1], **schedule,
    )  # fmt: skip


def _logged(reports: Any, config: Any) -> dict[str, torch.Tensor]:
    """As Megatron's training_log makes them."""
    kinds = config.moe_router_load_balancing_type
    names = [name for kind, name in LOGGED.items() if kind in kinds]
    if config.moe_z_loss_coeff is not None:
        names.append("z_loss")
    found: dict[str, torch.Tensor] = {}
    get_moe_metrics_tracker().report(
        loss_scale=0.5, iteration=0, force_initialize=True, track_names=names,
        num_layers=config.num_layers, total_loss_dict=found,
    )  # fmt: skip
    if reports:
        found["lm loss"] = torch.stack([report["lm loss"] for report in reports]).sum(0)
    return found
