"""Converted checkpoints in Megatron: its own names, transformers' logits, verify's word."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from safetensors.torch import load_file, save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_dr.hf import from_megatron, to_megatron
from megatron_dr.hf.config import parse, read_config
from megatron_dr.hf.torch_dist import Reader
from megatron_dr.mcore.convert import hf_model

from ._clean import ROOT, Clean, clean_process
from ._converted import LINEAR, LLAMA3, MODELS, SIZES, TOKENS, YARN, convert, megatron_logits
from ._ranks import run_ranks


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clean]:
    with clean_process(tmp_path_factory.mktemp("clean")) as process:
        yield process


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Folder (hf/, mcore/) and transformers' logits of each model."""
    return {name: convert(name, tmp_path_factory.mktemp(name)) for name in MODELS}


LAYOUTS = [(name, tp, 1) for name in MODELS for tp in (1, 2)]
LAYOUTS += [(name, 1, 2) for name in ("llama3.2", "qwen2", "mixtral")]


@pytest.mark.parametrize(
    "name, tp, pp", LAYOUTS, ids=[f"{name}-tp{tp}-pp{pp}" for name, tp, pp in LAYOUTS]
)
def test_logits_are_those_of_transformers(made: Any, name: str, tp: int, pp: int) -> None:
    folder, expected = made[name]
    found = run_ranks(tp * pp, megatron_logits, folder / "mcore", tp, pp)[-1]
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def megatron_names(folder: Path) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Tensors and objects that Megatron's own model asks a checkpoint for."""
    hf_model.initialize(1, 1)
    gpt = hf_model.build(parse(read_config(folder / "hf")), 512)
    tensors, objects = {}, set()
    for value in nested_values(gpt.sharded_state_dict()):
        built = value.build() if isinstance(value, ShardedTensorFactory) else value
        for item in nested_values({"": built}):
            if isinstance(item, ShardedTensor):
                tensors[item.key] = tuple(item.global_shape)
            else:
                objects.add(item.unique_key)
    return tensors, objects


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mixtral"])
def test_names_and_shapes_are_megatrons_own(made: Any, name: str) -> None:
    folder, _ = made[name]
    tensors, objects = run_ranks(1, megatron_names, folder)[0]
    reader = Reader(folder / "mcore" / "release")
    norm = "decoder.layers.pre_mlp_layernorm.weight"  # Transformer Engine's name before experts
    assert (norm in reader.tensors) is (name == "mixtral")
    sizes = {key: tuple(t.size) for key, t in reader.tensors.items() if key != norm}
    assert sizes == tensors
    others = set(reader.metadata.state_dict_metadata) - set(reader.tensors)
    assert others == objects | {"common_state/shard_0_1"}


def both_ways(folder: Path, out: Path) -> None:
    to_megatron.convert(to_megatron.plan(folder / "hf", to_megatron.Layout(1, 2)), out / "mcore")
    export = from_megatron.plan(out / "mcore", file_size=20000)
    from_megatron.convert(export, out / "hf")


def test_several_processes_write_one_checkpoint(made: Any, tmp_path: Path, clean: Clean) -> None:
    folder, expected = made["qwen3"]
    run_ranks(2, both_ways, folder, tmp_path)
    assert len(list((tmp_path / "mcore" / "release").glob("*.distcp"))) == 2
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert clean.logits(tmp_path / "hf", TOKENS).equal(expected)


def test_verify_says_whether_they_agree(made: Any, tmp_path: Path, clean: Clean) -> None:
    """By its exit code, with a prompt and without; a changed number is found and named."""
    folder, _ = made["qwen3"]
    shutil.copytree(folder / "hf", tmp_path / "hf")
    for path in (ROOT / "examples/sft/tokenizer").iterdir():
        shutil.copy(path, tmp_path / "hf")
    verify = ROOT / "tools" / "verify.py"
    code, said = clean.run(verify, tmp_path / "hf", folder / "mcore", "--prompt", "El temor.")
    assert code == 0 and "they agree" in said, said
    values = load_file(tmp_path / "hf" / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    values[name][3, 5] += 1e-3
    save_file(values, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    code, said = clean.run(verify, tmp_path / "hf", folder / "mcore")
    assert code == 1 and f"differs: {name}\n" in said and "they do NOT agree" in said
    assert said.count("differs:") == 1


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": LINEAR,
    "llama3": LLAMA3,
    "llama3.1": LLAMA3 | {"factor": 8.0},
    "yarn": YARN | {"original_max_position_embeddings": 4096, "rope_theta": 1e6},
    "yarn-factor": YARN | {"attention_factor": 1.3, "beta_fast": 24, "beta_slow": 2},
    "yarn-mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False},
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_positions_are_those_of_transformers(rope: dict[str, Any]) -> None:
    """cos and sin of a head of 64, far out."""
    config = transformers.LlamaConfig(**SIZES | {"head_dim": 64, "rope_parameters": rope})
    positions = torch.arange(0, 4000, 37).float()
    if rope["rope_type"] == "default":
        inverse, scale = 1.0 / rope["rope_theta"] ** (torch.arange(0, 64, 2).float() / 64), 1.0
    else:
        inverse, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    expected = torch.outer(positions, inverse)
    told = json.loads(config.to_json_string()) | {"architectures": ["LlamaForCausalLM"]}
    angles, factor = run_ranks(1, megatron_angles, parse(told))[0]
    assert factor == pytest.approx(scale, rel=1e-6)
    found = angles[positions.long()]
    for function in (torch.cos, torch.sin):
        torch.testing.assert_close(function(found), function(expected), rtol=0, atol=2e-3)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)


def megatron_angles(model: Any) -> tuple[torch.Tensor, float]:
    """Angles [4000, head / 2] of GPTModel's own embedding, and the factor on q and k."""
    hf_model.initialize(1, 1)
    gpt = hf_model.build(model, 512)
    embedding = gpt.rotary_pos_emb
    assert isinstance(embedding, RotaryEmbedding)
    out = embedding(4000)
    angles = out[0] if isinstance(embedding, YarnRotaryEmbedding) else out
    factor = gpt.decoder.layers[0].self_attention._yarn_concentration_factor
    return angles[:, 0, 0, : model.head_size // 2], factor
