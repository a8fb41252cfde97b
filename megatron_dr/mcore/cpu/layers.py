"""Megatron's local layers with the two pieces that exist only in Transformer Engine and apex.

Without those libraries Megatron-Core's attention refuses context parallelism and its norm refuses
sequence parallelism. `layer_spec` is Megatron's own local layer specification with these two
modules put in their place, so that every layout can be run on the CPU.
"""

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig


class Norm:
    """RMSNorm or LayerNorm whose parameters carry Megatron's `sequence_parallel` mark."""

    def __new__(
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> Any:
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm: Any = kind(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class Attention(torch.nn.Module):
    """softmax(Q K^T / sqrt(d)) V, causal; under context parallelism K and V are gathered.

    Shapes are Megatron's: query [s, b, heads, d], key and value [s, b, groups, d], s the local
    share of the sequence: chunks r and 2C - 1 - r of 2C for context-parallel rank r of C. Packed
    ("thd") ones have no b; a token then sees those of its own segment of `cu_seqlens_q` alone.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.config = config
        self.cp_group = getattr(kwargs.get("pg_collection"), "cp", None)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any,
        packed_seq_params: Any = None, **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        if packed:
            query, key, value = query[:, None], key[:, None], value[:, None]
        size = dist.get_world_size(self.cp_group) if self.cp_group is not None else 1
        rank = dist.get_rank(self.cp_group) if size > 1 else 0
        cached = key.shape[0] - query.shape[0]  # keys of earlier passes, in rollouts
        positions = cached + _positions(query.shape[0], rank, size)
        if size > 1:
            key = gather_from_sequence_parallel_region(key, group=self.cp_group)
            value = gather_from_sequence_parallel_region(value, group=self.cp_group)
        key_positions = torch.cat([_positions(key.shape[0] // size, r, size) for r in range(size)])
        mask = positions[:, None] >= key_positions[None, :]
        if packed:
            token = torch.arange(query.shape[0])
            segment = torch.bucketize(token, packed_seq_params.cu_seqlens_q, right=True)
            mask &= segment[:, None] == segment[None, :]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.config.attention_dropout if self.training else 0.0
        # as in Megatron's own: with sequence parallelism the ranks' state is their own already
        own_state = dropout > 0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if own_state else contextlib.nullcontext():
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
            )
        out = out.permute(2, 0, 1, 3).flatten(2)
        return out.squeeze(1) if packed else out


def _positions(length: int, rank: int, size: int) -> torch.Tensor:
    """Global positions of a rank's tokens in Megatron's zigzag split of the sequence."""
    if size == 1:
        return torch.arange(length)
    half = length // 2
    chunks = (rank, 2 * size - 1 - rank)
    return torch.cat([torch.arange(c * half, (c + 1) * half) for c in chunks])


def layer_spec(
    config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The block specification for `GPTModel(transformer_layer_spec=...)` on the CPU."""
    layer: ModuleSpec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm, normalization=config.normalization,
    )  # fmt: skip
    parts = layer.submodules
    parts.input_layernorm = Norm
    parts.pre_mlp_layernorm = Norm
    attention = parts.self_attention.submodules
    attention.core_attention = Attention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=Norm)
