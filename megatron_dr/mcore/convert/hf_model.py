"""Megatron's GPT model of a converted checkpoint, on the CPU, to compare its logits."""

import dataclasses
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dr.config.lora import LoRAConfig
from megatron_dr.hf.adapters import Adapters
from megatron_dr.hf.config import megatron_arguments
from megatron_dr.hf.model import Model
from megatron_dr.mcore import compat, unpickling
from megatron_dr.mcore.cpu.layers import layer_spec
from megatron_dr.mcore.model.lora import add_lora


def initialize(tp: int, pp: int) -> None:
    """Megatron's groups over all processes."""
    parallel_state.initialize_model_parallel(tp, pp)
    model_parallel_cuda_manual_seed(1)


def transformer_config(arguments: dict[str, Any]) -> TransformerConfig:
    """The configuration that Megatron's training makes of these arguments."""
    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    known = {name: value for name, value in arguments.items() if name in names}
    config = TransformerConfig(
        **known, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        num_moe_experts=arguments.get("num_experts"), moe_token_dispatcher_type="alltoall",
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32, perform_initialization=False, use_cpu_initialization=True,
        persist_layer_norm=False, gradient_accumulation_fusion=False, masked_softmax_fusion=False,
        bias_dropout_fusion=False, apply_rope_fusion=False,
    )  # fmt: skip
    compat.set_yarn(config, Namespace(**arguments))
    return config


def build(model: Model, vocabulary: int, adapters: Adapters | None = None) -> GPTModel:
    """This rank's part of the model, with `vocabulary` embedding rows; weights are not set.

    `adapters`: of the checkpoint that will be loaded; the model gets its own in the same places.
    """
    arguments = megatron_arguments(model, vocabulary)
    config = transformer_config(arguments)
    gpt = GPTModel(
        config, layer_spec(config), vocab_size=vocabulary,
        max_sequence_length=arguments["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(), parallel_output=True,
        share_embeddings_and_output_weights=model.tied,
        position_embedding_type=arguments["position_embedding_type"],
        rotary_base=arguments["rotary_base"], rope_scaling=arguments.get("use_rope_scaling", False),
        rope_scaling_factor=arguments.get("rope_scaling_factor", 8.0),
        seq_len_interpolation_factor=arguments.get("rotary_seq_len_interpolation_factor"),
    )  # fmt: skip
    if adapters is not None:
        places = tuple(re.escape(name) for name in adapters.layers(model.layers))
        add_lora([gpt], LoRAConfig(adapters.rank, adapters.alpha, targets=places), config)
    return gpt.eval()


def load(gpt: GPTModel, checkpoint: Path) -> None:
    """Megatron's own load, without running what its pickles name (collective)."""
    unpickling.restrict()
    states = {"model": gpt.sharded_state_dict()}
    gpt.load_state_dict(dist_checkpointing.load(states, str(checkpoint))["model"])


@torch.no_grad()
def logits(gpt: GPTModel, tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits [batch, length, vocabulary] of tokens [batch, length]; on the last stage (collective).

    The stages run one after the other: each gets what the one before it sends.
    """
    batch, length = tokens.shape
    if not gpt.pre_process:
        hidden = torch.empty(length, batch, gpt.config.hidden_size)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        gpt.set_input_tensor(hidden)
    positions = torch.arange(length).expand(batch, length)
    out = gpt(tokens, positions, None)
    if not gpt.post_process:
        dist.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return None
    gathered: torch.Tensor = gather_from_tensor_model_parallel_region(out)
    return gathered
