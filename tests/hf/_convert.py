"""Checkpoints of random values, and the converter's command line."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_dr.cli import convert
from megatron_dr.hf.config import parse
from megatron_dr.hf.mapping import hf_shapes, mapped_tensors

from ._shapes import config, tensors


def make(
    folder: Path, name: str = "LlamaForCausalLM", dtype: torch.dtype = torch.float32, **more: Any
) -> dict[str, torch.Tensor]:
    """A checkpoint of random values, as transformers lays it out; its tensors."""
    folder.mkdir()
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 12}
    found = config(name, 0, num_hidden_layers=2, **sizes, **more) | {"torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(found))
    (folder / "generation_config.json").write_text('{"max_length": 9}')
    (folder / "tokenizer.json").write_text("{}")
    values = tensors(hf_shapes(mapped_tensors(parse(found), 128)), dtype)
    save_file(values, folder / "model.safetensors")
    return values


def run(*argv: object) -> int:
    return convert.main([str(word) for word in argv])
