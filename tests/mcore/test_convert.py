"""Converted checkpoints in Megatron: its own names, transformers' logits, training and back."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
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
from megatron_dr.mcore import hf_model, train

from ._ranks import run_ranks

pytestmark = pytest.mark.skipif(
    "MEGATRON_DR_CONVERT" not in os.environ, reason="minutes: set MEGATRON_DR_CONVERT=1"
)

ROOT = Path(__file__).parents[2]
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
    "llama3.2": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
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


LOAD = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype="auto", attn_implementation="eager"
)
tokens = torch.arange(2 * 40).reshape(2, 40) * 37 % 301
with torch.no_grad():
    torch.save(model(tokens).logits, sys.argv[2])
"""


def loaded_logits(folder: Path) -> torch.Tensor:
    """transformers' logits on TOKENS, in a process in which no CUDA name is replaced."""
    out = folder / "logits.pt"
    subprocess.run([sys.executable, "-c", LOAD, folder, out], check=True, timeout=120)
    found: torch.Tensor = torch.load(out)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Folder (hf/, mcore/) and transformers' logits of each model."""
    found = {}
    for name in MODELS:
        folder = tmp_path_factory.mktemp(name)
        expected = make(name, folder / "hf")
        experts = bool(parse(read_config(folder / "hf")).experts)
        layout = to_megatron.Layout(2, 2, 2 if experts else 1)
        to_megatron.convert(to_megatron.plan(folder / "hf", layout), folder / "mcore")
        found[name] = (folder, expected)
    return found


def megatron_logits(checkpoint: Path, tp: int, pp: int, config: Path | None = None) -> Any:
    export = from_megatron.plan(checkpoint, config)
    hf_model.initialize(tp, pp)
    rows = export.reader.tensors["embedding.word_embeddings.weight"][0][0]
    gpt = hf_model.build(export.model, rows)
    hf_model.load(gpt, export.reader.folder)
    found = hf_model.logits(gpt, TOKENS)
    return found if found is None else found[..., : export.model.vocabulary]


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (1, 2)], ids=["tp1", "tp2", "pp2"])
@pytest.mark.parametrize("name", MODELS)
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
    sizes = {key: size for key, (size, _) in reader.tensors.items() if key != norm}
    assert sizes == tensors
    others = set(reader.metadata.state_dict_metadata) - set(reader.tensors)
    assert others == objects | {"common_state/shard_0_1"}


def both_ways(folder: Path, out: Path) -> None:
    to_megatron.convert(to_megatron.plan(folder / "hf", to_megatron.Layout(1, 2)), out / "mcore")
    export = from_megatron.plan(out / "mcore", file_size=20000)
    from_megatron.convert(export, out / "hf")


def test_several_processes_write_one_checkpoint(made: Any, tmp_path: Path) -> None:
    folder, expected = made["qwen3"]
    run_ranks(2, both_ways, folder, tmp_path)
    assert len(list((tmp_path / "mcore" / "release").glob("*.distcp"))) == 2
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert loaded_logits(tmp_path / "hf").equal(expected)


def verify(source: Path, checkpoint: Path) -> tuple[int, str]:
    command = [sys.executable, ROOT / "tools" / "verify.py", source, checkpoint]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    return done.returncode, done.stdout


def test_verify_says_whether_they_agree(made: Any, tmp_path: Path) -> None:
    folder, _ = made["qwen3"]
    code, said = verify(folder / "hf", folder / "mcore")
    assert code == 0 and "they agree" in said
    shutil.copytree(folder / "hf", tmp_path / "hf")
    values = load_file(tmp_path / "hf" / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    values[name][3, 5] += 1e-3
    save_file(values, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    code, said = verify(tmp_path / "hf", folder / "mcore")
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


def launch(argv: list[str]) -> tuple[int, str, str]:
    out, error, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["megatron_dr.train", *argv]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            train.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return code, out.getvalue(), error.getvalue()


def training_flags(loaded: Path, saved: Path, data: Path, layout: str) -> list[str]:
    model = (loaded / "hf" / "megatron_flags.txt").read_text()
    return f"""--dr-device cpu {model} --load {loaded} --save {saved} --save-interval 2
        --train-iters 2 --train-data-path {data} --seq-length 32 --lr 1e-2 --lr-decay-style constant
        --tokenizer-type HuggingFaceTokenizer --use-distributed-optimizer --eval-iters 0
        --eval-interval 100 --tokenizer-model {ROOT / "examples/sft/tokenizer"} --micro-batch-size 1
        --global-batch-size 4 --log-interval 1 {layout}""".split()


@pytest.mark.parametrize(
    "name, layout",
    [
        ("qwen2", "--tensor-model-parallel-size 2 --sequence-parallel"),
        ("llama3.2", "--pipeline-model-parallel-size 2"),
        ("qwen3", ""),
    ],
    ids=["qwen2-tp2", "llama3.2-pp2", "qwen3-dp2"],
)
def test_training_goes_on_and_its_result_is_exported(
    made: Any, tmp_path: Path, name: str, layout: str
) -> None:
    folder, before = made[name]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"{n} The fear."}) + "\n" for n in range(20)))
    argv = training_flags(folder / "mcore", tmp_path / "saved", data, layout)
    code, out, error = run_ranks(2, launch, argv)[0]
    assert code == 0, error[-3000:]
    assert "successfully loaded checkpoint" in out
    # the configuration is found where the run had loaded from
    export = from_megatron.plan(tmp_path / "saved")
    from_megatron.convert(export, tmp_path / "back")
    after = loaded_logits(tmp_path / "back")
    assert (after - before).abs().max() > 1e-2  # it has learnt something
    found = run_ranks(1, megatron_logits, tmp_path / "saved", 1, 1)[0]
    torch.testing.assert_close(found, after, rtol=1e-4, atol=1e-5 * after.abs().max().item())
