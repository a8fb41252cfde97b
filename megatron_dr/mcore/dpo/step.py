"""A microbatch of pairs: its forward and DPO's loss, as Megatron's schedules call them.

A microbatch of P pairs is 2 P sequences: the chosen answers, then the rejected ones in the same
order. The schedules are told of 2 P: between pipeline stages that is the shape of what is sent.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from megatron_dr.config.dpo import SEQUENCES, PreferenceConfig
from megatron_dr.rl.preference import completion_log_prob, dpo_loss

Batch = dict[str, torch.Tensor]


def forward(model: torch.nn.Module, found: Batch) -> tuple[torch.Tensor, Batch]:
    """This stage's output for a microbatch, and the microbatch on the device: [2 P, ...] each."""
    device = torch.cuda.current_device()
    batch = {
        name: value.to(device, non_blocking=True).transpose(0, 1).flatten(0, 1)
        for name, value in found.items()
    }
    mask = batch.get("attention_mask")
    output = model(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"])
    return output, batch


def answers(losses_BT: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Log-probabilities of the answers [2 P], of the last stage's output."""
    return completion_log_prob(-losses_BT.float(), batch["answer_mask"])


def preference_step(
    dpo: PreferenceConfig, data_iterator: Iterator[Batch], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[..., Any]]:
    """A `forward_step_func`; every rank reads the whole microbatch from its own iterator."""
    output, batch = forward(model, next(data_iterator))
    return output, partial(loss_func, dpo, batch)


def loss_func(dpo: PreferenceConfig, batch: Batch, losses_BT: torch.Tensor) -> Any:
    """The pairs' losses times the tokens of each, the tokens, and (sum, number) of each value for
    the log.

    All microbatches of a role have as many pairs, so that Megatron's mean over microbatches, or
    with --calculate-per-token-loss over what was counted, is the mean over the pairs. All tokens
    are counted, padding too: routers of experts weigh their auxiliary losses by them.
    """
    log_prob_B, reference_B = answers(losses_BT, batch), batch["reference_log_prob"]
    chosen_P, rejected_P = log_prob_B.chunk(SEQUENCES)
    chosen_before_P, rejected_before_P = reference_B.chunk(SEQUENCES)
    loss, count = dpo_loss(
        chosen_P, rejected_P, chosen_before_P, rejected_before_P, dpo.beta, dpo.label_smoothing
    )
    better_P = (chosen_P - chosen_before_P).detach()
    worse_P = (rejected_P - rejected_before_P).detach()
    margin_P = dpo.beta * (better_P - worse_P)
    right_P = torch.where(margin_P.isnan(), margin_P, (margin_P > 0).to(margin_P))
    report = {
        "dpo loss": loss.detach(), "accuracy": right_P.sum(),
        "margin": margin_P.sum(), "chosen log ratio": better_P.sum(),
        "rejected log ratio": worse_P.sum(),
    }  # fmt: skip
    logged = {name: torch.stack([value, count.to(value)]) for name, value in report.items()}
    tokens = torch.tensor(losses_BT.numel(), dtype=torch.int, device=losses_BT.device)
    return loss * (tokens / count), tokens, logged
