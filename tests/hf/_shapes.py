"""Sampled models: every family, with odd sizes, and random tensors for them."""

import random
from typing import Any

import torch

from megatron_dr.hf.families import FAMILIES


def config(architecture: str, seed: int, **more: Any) -> dict[str, Any]:
    """A config.json with sizes drawn by `seed`."""
    draw = random.Random(seed)
    groups, per_group, head = draw.choice((1, 2, 3)), draw.choice((1, 2, 5)), draw.choice((2, 4))
    found = {
        "architectures": [architecture],
        "hidden_size": draw.choice((6, 10, 16)),
        "intermediate_size": draw.choice((4, 12, 22)),
        "moe_intermediate_size": draw.choice((4, 6)),
        "num_hidden_layers": draw.choice((1, 2, 4)),
        "num_attention_heads": groups * per_group,
        "num_key_value_heads": groups,
        "head_dim": head,
        "vocab_size": draw.choice((7, 101, 129)),
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": draw.choice((True, False)),
        "hidden_act": "silu",
        "num_experts_per_tok": 2,
    }
    if FAMILIES[architecture].experts_key:
        found["num_local_experts"] = draw.choice((2, 4))
    return found | more


def tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random values, all bits of the mantissa in use."""
    generator = torch.Generator().manual_seed(len(shapes))
    return {name: torch.randn(s, generator=generator).to(dtype) for name, s in shapes.items()}
