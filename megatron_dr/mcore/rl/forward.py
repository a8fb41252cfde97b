"""A microbatch's forward and loss in training by rewards, as Megatron's schedules call them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_dr.config.rl import RLConfig
from megatron_dr.mcore.model import value_head
from megatron_dr.rl.objective import objective

Batch = dict[str, torch.Tensor]


def policy_step(
    rl: RLConfig, data_iterator: Iterator[Batch], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[..., Any]]:
    """A `forward_step_func`; every rank reads the whole microbatch from its own iterator."""
    device = torch.cuda.current_device()
    batch = {name: value.to(device) for name, value in next(data_iterator).items()}
    output = value_head.outputs(model, batch["tokens"], batch["position_ids"], batch["labels"])

    def loss_func(output: torch.Tensor) -> Any:
        losses_BT, value_BT = output.float(), None
        if "value" in batch:
            losses_BT, value_BT = losses_BT.unbind(-1)
        return objective(-losses_BT, value_BT, batch, rl)

    return output, loss_func
