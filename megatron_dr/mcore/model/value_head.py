"""The value head: returns predicted from the last hidden state that the output layer reads.

    V_t = w . h_t + b ,    h_t after the final norm

One linear map in the model chunk that has the output layer, made before DDP wraps the chunk: so it
lies in Megatron's gradient buffers, optimizer and checkpoints like any other parameter. It begins
at 0. Its values are computed in fp32 and only where they are asked for (`outputs`): for rollouts
and the frozen reference the model is the one that it is without the head.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dr.mcore.compat import unwrap
from megatron_dr.projection import UNPROJECTED

NAME = UNPROJECTED  # of the module in its chunk, and the first part of its parameters' names


class ValueHead(torch.nn.Module):
    """A value for each token; replicated over tensor-parallel ranks.

    Under sequence parallelism a rank has a share of the tokens alone: its gradient is then partial,
    and is marked as Megatron marks that of norms. It is marked as an output layer, too: so it has
    --decoupled-lr.
    """

    def __init__(self, config: TransformerConfig, device: torch.device) -> None:
        super().__init__()
        zeros = functools.partial(torch.zeros, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(zeros(1, config.hidden_size))
        self.bias = torch.nn.Parameter(zeros(1))
        self.sequence_parallel = config.sequence_parallel
        for parameter in self.parameters():
            marked: Any = parameter
            marked.sequence_parallel = self.sequence_parallel
            marked.is_embedding_or_output_parameter = True

    def forward(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """[B, S] of all tokens, fp32, on every tensor-parallel rank."""
        value_SB = hidden_SBH.float() @ self.weight.float()[0] + self.bias.float()
        if self.sequence_parallel:
            # every rank computes the whole loss: a rank's share of its gradient is a slice of it
            value_SB = gather_from_sequence_parallel_region(
                value_SB, tensor_parallel_output_grad=False,
                group=parallel_state.get_tensor_model_parallel_group(),
            )  # fmt: skip
        return value_SB.t()


def add_value_head(model: Sequence[torch.nn.Module]) -> Sequence[torch.nn.Module]:
    """Give the chunk that has the output layer a head; for Megatron's `pre_wrap_hooks`."""
    for chunk in model:
        bare: Any = unwrap(chunk)
        if bare.post_process:
            setattr(bare, NAME, ValueHead(bare.config, next(bare.parameters()).device))
    return model


def outputs(
    model: torch.nn.Module, tokens: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """A chunk's forward; of one with a head [B, S, 2]: each label's loss and each token's value.

    They are one tensor, so that a backward through the chunk begins with it, whatever the loss.
    """
    head = getattr(unwrap(model), NAME, None)
    more = {} if head is None else {
        "output_processor": _losses_and_values, "output_processor_context": head,
    }  # fmt: skip
    output: torch.Tensor = model(tokens, positions, None, labels=labels, **more)
    return output


def _losses_and_values(
    *, hidden_states: torch.Tensor, output_layer: torch.nn.Module,
    output_weight: torch.Tensor | None, labels: torch.Tensor, runtime_gather_output: bool | None,
    compute_language_model_loss: Callable[..., torch.Tensor], scale_logits: Callable[..., Any],
    context: ValueHead, **_: Any,
) -> torch.Tensor:  # fmt: skip
    """What GPTModel calls in place of its own last lines."""
    logits, _ = output_layer(
        hidden_states, weight=output_weight, runtime_gather_output=runtime_gather_output
    )
    losses = compute_language_model_loss(labels, scale_logits(logits))
    return torch.stack([losses.float(), context(hidden_states)], -1)
