"""Forward passes without gradients, by the schedule of training: log-probabilities and values."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from megatron_dr.mcore.compat import unwrap
from megatron_dr.mcore.model import value_head
from megatron_dr.mcore.rollouts.cache import share_along_pipeline
from megatron_dr.mcore.rollouts.megatron import check_layout
from megatron_dr.mcore.rollouts.state import evaluating
from megatron_dr.mcore.step.schedule import group_size

# A stage's output for a microbatch, and what is asked of the last stage's [b, ...].
Output = tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]
Forward = Callable[[torch.nn.Module, Any], Output]


def forward_only(
    model: Sequence[torch.nn.Module], forward: Forward, batches: Sequence[Iterator[Any]],
    number: int, size: int, length: int, shape: tuple[int, ...] = (),
) -> torch.Tensor:  # fmt: skip
    """What a forward gives for all microbatches: [number x size, *shape], float32.

    One schedule call of training in evaluation mode. Ranks of one model's copy pass the same and
    all get the result; data-parallel ranks pass their own.

    Args:
        model: Megatron's list of model chunks.
        batches: the microbatches, for each chunk.
        number: of microbatches, as the schedule divides them.
        size, length: of a microbatch, in sequences and tokens.
        shape: of what is asked of a sequence.
    """

    def forward_step(data_iterator: Iterator[Any], chunk: torch.nn.Module) -> tuple[Any, Any]:
        output, asked = forward(chunk, next(data_iterator))
        return output, lambda output, **_: asked(output)

    alone = len(model) == 1
    with evaluating(model):
        found = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=batches[0] if alone else list(batches),
            model=model[0] if alone else list(model), num_microbatches=number, seq_length=length,
            micro_batch_size=size, forward_only=True, collect_non_loss_data=True,
        )  # fmt: skip
    out = torch.zeros(number * size, *shape, device=torch.cuda.current_device())
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        out.copy_(torch.cat(found))
    return share_along_pipeline(out)


def log_probs(
    model: Sequence[torch.nn.Module], tokens: torch.Tensor, mask: torch.Tensor,
    micro_batch_size: int = 1,
) -> torch.Tensor:  # fmt: skip
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
    return -_by_token(model, tokens, mask, micro_batch_size, _losses, ())


def log_probs_and_values(
    model: Sequence[torch.nn.Module], tokens: torch.Tensor, mask: torch.Tensor,
    micro_batch_size: int,
) -> torch.Tensor:  # fmt: skip
    """`log_probs`, and the values at the token before, of one pass: [n, s, 2], float32."""
    found = _by_token(model, tokens, mask, micro_batch_size, value_head.outputs, (2,))
    return found * found.new_tensor([-1.0, 1.0])


def _losses(
    chunk: torch.nn.Module, tokens: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    output: torch.Tensor = chunk(tokens, positions, None, labels=labels)
    return output


def _by_token(
    model: Sequence[torch.nn.Module], tokens: torch.Tensor, mask: torch.Tensor, size: int,
    chunk_forward: Callable[..., torch.Tensor], shape: tuple[int, ...],
) -> torch.Tensor:  # fmt: skip
    """What a chunk's forward of tokens, positions and labels gives at the token before."""
    check_layout()
    _check(tokens, mask, int(unwrap(model[0]).max_sequence_length))  # type: ignore[arg-type]
    rows, length = tokens.shape
    if rows == 0:
        return torch.zeros(0, length, *shape, device=torch.cuda.current_device())
    microbatches = _microbatches(model, tokens.to(torch.cuda.current_device()), size)

    def forward(chunk: torch.nn.Module, tokens: torch.Tensor) -> Output:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        # the label of the last token is none of the sequence's; its loss is dropped
        return chunk_forward(chunk, tokens, positions, tokens.roll(-1, 1)), torch.Tensor.float

    padded = microbatches[0].shape[1]
    found = forward_only(
        model, forward, [iter(microbatches) for _ in model], len(microbatches), size, padded,
        (padded, *shape),
    )  # fmt: skip
    before = found[:rows, : length - 1]
    out = torch.cat([torch.zeros_like(found[:rows, :1]), before], 1)
    return out * (mask.to(out.device) != 0).view(rows, length, *(1 for _ in shape))


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
    group = size * group_size(model)
    rows, length = tokens.shape
    padding = (0, -length % split, 0, -rows % group)
    return list(torch.split(torch.nn.functional.pad(tokens, padding), size))
