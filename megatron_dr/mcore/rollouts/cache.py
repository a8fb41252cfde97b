"""Forward passes with cached keys and values, through all stages of the pipeline."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.inference.communication_utils import (
    recv_from_prev_pipeline_rank_,
    send_to_next_pipeline_rank,
)
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from megatron.core.utils import get_model_config

from megatron_dr.mcore.compat import unwrap


class CachedForward:
    """A batch's forward passes, each over the tokens that follow those of the pass before.

    The cache is Megatron's static inference context, filled by its attention layers.
    """

    def __init__(self, model: Sequence[torch.nn.Module], rows: int, length: int) -> None:
        self.model = model
        self.config = get_model_config(model[0])
        self.context = StaticInferenceContext(rows, length)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Logits [b, padded vocabulary] after the last of tokens [b, s], on the last stage.

        All ranks of a model's copy call it with the same tokens.
        """
        rows, length = tokens.shape
        start = self.context.sequence_len_offset
        positions = torch.arange(start, start + length, device=tokens.device).expand(rows, length)
        output = None
        for chunk in self.model:
            bare: Any = unwrap(chunk)
            received = None if bare.pre_process else self._receive(rows, length)
            bare.set_input_tensor(received)
            with InferenceMode.active():  # logits of the last position alone, from all ranks
                output = chunk(
                    tokens, positions, None, inference_context=self.context,
                    runtime_gather_output=True,
                )  # fmt: skip
            bare.set_input_tensor(None)
            if not bare.post_process:
                send_to_next_pipeline_rank(output.contiguous())
                output = None
        self.context.increment_sequence_len_offset(length)
        return None if output is None else output[:, -1].float()

    def keep(self, rows: list[int]) -> None:
        """Drop the other rows of the batch from the cache."""
        kept = self.context.key_value_memory_dict
        for layer, (keys, values) in kept.items():
            kept[layer] = (keys[:, rows], values[:, rows])
        self.context.max_batch_size = len(rows)

    def _receive(self, rows: int, length: int) -> torch.Tensor:
        dtype = self.config.pipeline_dtype or self.config.params_dtype
        shape = (length, rows, self.config.hidden_size)
        buffer = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
        recv_from_prev_pipeline_rank_(buffer)
        return buffer


def share_from_last_stage(values: torch.Tensor) -> torch.Tensor:
    """The values of the last stage's tensor-parallel rank 0, on all ranks of the model's copy."""
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        source = parallel_state.get_tensor_model_parallel_src_rank()
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.broadcast(values, source, group)
    return share_along_pipeline(values)


def share_along_pipeline(values: torch.Tensor) -> torch.Tensor:
    """Each last-stage rank's values, on the ranks of its pipeline."""
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    group = parallel_state.get_pipeline_model_parallel_group()
    torch.distributed.broadcast(values, source, group)
    return values
