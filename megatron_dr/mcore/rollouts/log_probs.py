"""Log-probabilities of given tokens by the training forward, without gradients."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from megatron_dr.mcore.compat import unwrap
from megatron_dr.mcore.rollouts.cache import share_along_pipeline
from megatron_dr.mcore.rollouts.megatron import check_layout
from megatron_dr.mcore.rollouts.state import evaluating


def log_probs(
    model: Sequence[torch.nn.Module],
    tokens: torch.Tensor,
    mask: torch.Tensor,
    micro_batch_size: int = 1,
) -> torch.Tensor:
    """log p(token t | tokens before t) where the mask is 1, and 0 elsewhere: [n, s], float32.

    The passes are those of training (Megatron's schedule, vocabulary-parallel cross entropy over
    the padded vocabulary) in evaluation mode. Ranks of one model's copy pass the same tokens and
    all get the result; data-parallel ranks pass their own, of any number.

    Args:
        model: Megatron's list of model chunks: the policy, or a reference.
        tokens: [n, s] ids; rows end in padding of any id.
        mask: [n, s], 1 at the tokens asked for; not at a row's first token.

    Raises:
        ValueError: if shapes differ, the mask asks for a first token, or s exceeds the context.
    """
    return -by_token(model, tokens, mask, micro_batch_size, _forward_step)


def by_token(
    model: Sequence[torch.nn.Module], tokens: torch.Tensor, mask: torch.Tensor,
    micro_batch_size: int, forward_step: Callable[..., Any], shape: tuple[int, ...] = (),
) -> torch.Tensor:  # fmt: skip
    """What a forward step gives at the token before, as `log_probs`: [n, s, *shape], float32.

    Args:
        forward_step: of Megatron's schedules, with outputs [b, s, *shape]; its loss function is
            called with `non_loss_data`.
    """
    check_layout()
    _check(tokens, mask, unwrap(model[0]).max_sequence_length)
    rows, length = tokens.shape
    if rows == 0:
        return torch.zeros(0, length, *shape, device=torch.cuda.current_device())
    microbatches = _microbatches(model, tokens.to(torch.cuda.current_device()), micro_batch_size)
    iterators = [iter(microbatches) for _ in model]
    alone = len(model) == 1
    with evaluating(model):
        found = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators[0] if alone else iterators,
            model=model[0] if alone else list(model),
            num_microbatches=len(microbatches),
            seq_length=microbatches[0].shape[1],
            micro_batch_size=micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )
    out = torch.zeros(rows, length, *shape, device=torch.cuda.current_device())
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        out[:, 1:] = torch.cat(found)[:rows, : length - 1]
    chosen = (mask.to(out.device) != 0).view(rows, length, *(1 for _ in shape))
    return share_along_pipeline(out) * chosen


def _check(tokens: torch.Tensor, mask: torch.Tensor, context: int) -> None:
    if tokens.dim() != 2 or tokens.shape != mask.shape:
        raise ValueError(
            f"tokens {list(tokens.shape)} and mask {list(mask.shape)} must both be [rows, length]."
        )
    if tokens.shape[1] > context:
        raise ValueError(
            f"sequences of {tokens.shape[1]} tokens exceed the model's context of {context}: "
            "shorten prompts or completions."
        )
    if mask[:, :1].any():
        raise ValueError("the first token of a sequence has no log-probability: mask it out.")


def _microbatches(
    model: Sequence[torch.nn.Module], tokens: torch.Tensor, size: int
) -> list[torch.Tensor]:
    """Equal microbatches [size, s']: the schedules need one shape, and what they divide by."""
    config = get_model_config(model[0])
    split = config.tensor_model_parallel_size if config.sequence_parallel else 1
    group = size * (config.pipeline_model_parallel_size if len(model) > 1 else 1)
    rows, length = tokens.shape
    padding = (0, -length % split, 0, -rows % group)
    return list(torch.nn.functional.pad(tokens, padding).split(size))


def _forward_step(
    data_iterator: Iterator[torch.Tensor], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[..., Any]]:
    tokens = next(data_iterator)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    # the label of the last token is none of the sequence's; its loss is dropped
    output = model(tokens, positions, None, labels=tokens.roll(-1, 1))
    return output, as_it_is


def as_it_is(output: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
    return output.float()
