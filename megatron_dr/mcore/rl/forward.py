"""A microbatch's forward and loss in training by rewards, as Megatron's schedules call them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_dr.rl.objective import objective

Batch = dict[str, torch.Tensor]


class PolicyStep:
    """The `forward_step_func`; every rank reads the whole microbatch from its own iterator.

    Args:
        clip: how far the ratio may move from 1.
        kl_weight: of the KL to the reference; 0 without one.
    """

    def __init__(self, clip: float, kl_weight: float) -> None:
        self.clip, self.kl_weight = clip, kl_weight

    def __call__(
        self, data_iterator: Iterator[Batch], model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        device = torch.cuda.current_device()
        batch = {name: value.to(device) for name, value in next(data_iterator).items()}
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

        def loss_func(losses_BT: torch.Tensor) -> Any:
            return objective(-losses_BT.float(), batch, self.clip, self.kl_weight)

        return output, loss_func
