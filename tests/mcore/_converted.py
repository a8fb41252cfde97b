"""Tiny random checkpoints of every family, made by transformers, and Megatron's logits of them."""

from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_dr.hf import from_megatron, to_megatron
from megatron_dr.hf.config import parse, read_config
from megatron_dr.mcore.convert import hf_model

SIZES = {
    "vocab_size": 301, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "attn_implementation": "eager",
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama3.2": (
        "Llama",
        {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "num_hidden_layers": 4},
    ),
    "llama-linear": ("Llama", {"rope_parameters": LINEAR}),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16},
    ),
}
TOKENS = torch.arange(2 * 40).reshape(2, 40) * 37 % 301


def make(name: str, folder: Path) -> torch.Tensor:
    """A random checkpoint by transformers, biases and norms too; its logits on TOKENS."""
    torch.manual_seed(3)
    kind, more = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**SIZES | more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "bias" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "_proj" in key or "experts" in key or "gate" in key:
                parameter.mul_(5)  # so that attention and positions matter
        out = model(TOKENS).logits
    model.save_pretrained(folder)
    return out


def convert(name: str, folder: Path) -> tuple[Path, torch.Tensor]:
    """Make hf/ and mcore/ in a folder; transformers' logits."""
    expected = make(name, folder / "hf")
    experts = bool(parse(read_config(folder / "hf")).experts)
    layout = to_megatron.Layout(2, 2, 2 if experts else 1)
    to_megatron.convert(to_megatron.plan(folder / "hf", layout), folder / "mcore")
    return folder, expected


def megatron_logits(checkpoint: Path, tp: int, pp: int, config: Path | None = None) -> Any:
    """On a rank: logits on TOKENS, on the last stage."""
    export = from_megatron.plan(checkpoint, config)
    hf_model.initialize(tp, pp)
    rows = export.reader.tensors["embedding.word_embeddings.weight"].size[0]
    gpt = hf_model.build(export.model, rows, export.adapters)
    hf_model.load(gpt, export.reader.folder)
    found = hf_model.logits(gpt, TOKENS)
    return found if found is None else found[..., : export.model.vocabulary]
