"""Auxiliary losses of experts beside losses that bring counts of their own: RL and DPO.

Where the loss's own gradient is 0, what is left is Megatron's mean of the auxiliary losses over
the microbatches, as a step without a per-token loss has it. Text has Megatron's own factor.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_dr.config.dpo import PreferenceConfig
from megatron_dr.config.dr import DRConfig
from megatron_dr.config.rl import RLConfig
from megatron_dr.mcore.attach import attach
from megatron_dr.mcore.compat import versions
from megatron_dr.mcore.dpo.step import preference_step
from megatron_dr.mcore.rl.forward import policy_step
from megatron_dr.rl.experience import Experience, ExperienceStream

from . import _data, _megatron
from ._data import Layout
from ._ranks import run_ranks

LENGTH, ROWS, SIZE, ALPHA = 12, 8, 2, 0.3
COUNTED = 5  # of a microbatch's SIZE x LENGTH tokens, by `nothing`
Batch = dict[str, torch.Tensor]
Found = dict[str, torch.Tensor]


def experience(seed: int) -> Experience:
    """Completions of unequal lengths without a gradient: all advantages are 0."""
    noise = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 60, (ROWS, LENGTH), generator=noise, dtype=torch.int32)
    mask = torch.arange(LENGTH) < 1 + torch.arange(ROWS)[:, None] % 5
    zero = torch.zeros(ROWS, LENGTH)
    return Experience(seed, tokens, mask.to(torch.uint8), zero, zero, zero[:, 0], zero[:, :1], {})


def stream(seed: int, aggregation: Any) -> ExperienceStream:
    rank, size = (f() for f in (parallel_state.get_data_parallel_rank,
                                parallel_state.get_data_parallel_world_size))  # fmt: skip
    out = ExperienceStream(
        micro_batch_size=SIZE, rank=rank, size=size, batch_size=ROWS, aggregation=aggregation,
        plain=False,
    )  # fmt: skip
    out.show(experience(seed), 3)
    return out


def pairs(seed: int) -> Iterator[Batch]:
    """The stream's sequences as pairs of equal log-probabilities: no answer has a token."""
    for batch in stream(seed, "token"):
        both = {name: batch[name].view(1, 2, LENGTH) for name in ("tokens", "labels")}
        position = batch["position_ids"].view(1, 2, LENGTH)
        yield both | {
            "position_ids": position, "answer_mask": torch.zeros(1, 2, LENGTH),
            "loss_mask": torch.full((1, 1), 2.0 * LENGTH),
            "reference_log_prob": torch.zeros(1, 2),
        }  # fmt: skip


def nothing(data: Iterator[Batch], model: Any) -> Any:
    """The same tokens with a loss of 0, of any count."""
    batch = next(data)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, lambda out: (0 * out.sum(), torch.tensor(COUNTED, dtype=torch.int), {})


def gradient(layout: Layout, forward: Any, data: Any, dr: DRConfig | None = None) -> Any:
    """A step's gradient, in pieces; with `dr` of both roles."""
    model, optimizer, config = _megatron.build(layout, _megatron_initial(layout))
    model[0].zero_grad_buffer()
    number = ROWS // SIZE // parallel_state.get_data_parallel_world_size()
    schedule: dict[str, Any] = {
        "forward_step_func": forward, "data_iterator": data[0], "model": model[0],
        "num_microbatches": number, "seq_length": LENGTH, "micro_batch_size": SIZE,
        "forward_only": False,
    }  # fmt: skip
    if dr is None:
        get_forward_backward_func()(**schedule)
    else:
        handle = attach(model, optimizer, config, dr)
        handle.step(get_forward_backward_func(), target_data_iterator=data[1],
                    num_target_microbatches=number, target_micro_batch_size=SIZE,
                    **schedule)  # fmt: skip
        handle.detach()
    return _megatron.pieces(model, config, "main_grad")


def _megatron_initial(layout: Layout) -> Found:
    from . import _oracle

    return _oracle.initial(layout)


def steps(layout: Layout, kind: str) -> dict[str, Any]:
    """On a rank: gradients by what was run; plain ones of both roles' sequences."""
    _data.LENGTH = LENGTH
    stock: Callable[..., Any] = _megatron.transformer_config

    def with_losses(layout: Layout) -> Any:
        config = stock(layout)
        config.moe_router_load_balancing_type = kind
        config.moe_aux_loss_coeff, config.moe_z_loss_coeff = 0.5, 0.05
        return config

    _megatron.transformer_config = with_losses
    _megatron.initialize(layout)
    per_token = dataclasses.replace(layout, per_token=True)
    policy = partial(policy_step, RLConfig(reward="a:b", kl=0.0))
    preference = partial(preference_step, PreferenceConfig())
    found = {f"plain {seed}": gradient(layout, nothing, [stream(seed, "token")]) for seed in (1, 2)}
    for aggregation in ("token", "sequence"):
        both = lambda: [stream(seed, aggregation) for seed in (1, 2)]  # noqa: B023, E731
        found[f"policy {aggregation}"] = gradient(per_token, policy, both())
        for rows, more in (("slot", {"slots": 2}), ("sample", {"alpha": 0.3})):
            dr = DRConfig(set="mean", rows=rows, **{"alpha": ALPHA} | more)
            found[f"policy {aggregation} {rows}"] = gradient(per_token, policy, both(), dr)
    for each in (layout, per_token):
        found[f"pairs {each.per_token}"] = gradient(each, preference, [pairs(1)])
    dr = DRConfig(set="mean", rows="slot", slots=2, alpha=ALPHA)
    two = [stream(seed, "token") for seed in (1, 2)]
    found["text"] = gradient(per_token, nothing, [stream(1, "token")])
    found["text slot"] = gradient(per_token, nothing, two, dr)
    return found


OF_SEQUENCES = pytest.mark.skipif(
    versions.INSTALLED <= (0, 18), reason="Megatron 0.18 divides it by a batch's sequences"
)


@pytest.mark.parametrize(
    "world, kind", [(1, "aux_loss"), pytest.param(2, "seq_aux_loss", marks=OF_SEQUENCES)]
)
def test_only_megatrons_mean_over_microbatches_is_left(world: int, kind: str) -> None:
    ranks = run_ranks(world, steps, Layout(moe=True, dp=world), kind)
    found = {name: _megatron.whole([r[name] for r in ranks]) for name in ranks[0]}
    plain, target = found.pop("plain 1"), found.pop("plain 2")
    router = [name for name in plain if name.endswith("router.weight")]
    assert router and all(plain[name].norm() > 1e-3 for name in router)
    for name, gradients in found.items():
        mixed = ALPHA if name.endswith(("slot", "sample")) else 0.0
        # of text Megatron counts the tokens with a loss, and its router multiplies by all
        factor = SIZE * LENGTH / COUNTED if name.startswith("text") else 1.0
        for parameter, value in gradients.items():
            wanted = factor * torch.lerp(plain[parameter], target[parameter], mixed)
            torch.testing.assert_close(
                value, wanted, rtol=1e-4, atol=1e-6, msg=f"{name}: {parameter}"
            )
