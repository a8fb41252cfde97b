"""LoRA's adapters of a Megatron checkpoint, against products written out; no Megatron needed."""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_dr.config.lora import LoRAConfig
from megatron_dr.hf import adapters, from_megatron, to_megatron, torch_dist
from megatron_dr.hf.mapping import Mapped, take

from ._convert import make, run

RANK = 3


def saved(folder: Path, layers: tuple[int, ...], **arguments: Any) -> dict[str, torch.Tensor]:
    """A checkpoint in which every matrix of these layers has an adapter; A and B by key, layer."""
    plan = to_megatron.plan(folder / "hf", to_megatron.Layout())
    pieces, pairs = list(plan.pieces((0, 0, 0))), {}
    generator = torch.Generator().manual_seed(5)
    for tensor in plan.tensors:
        if len(tensor.index) != 1 or len(tensor.shape) != 2 or tensor.index[0] not in layers:
            continue
        for mark, shape in (("a", (RANK, tensor.shape[1])), ("b", (tensor.shape[0], RANK))):
            key = f"{tensor.key.removesuffix('.weight')}.lora_{mark}.weight"
            value = torch.randn(shape, generator=generator).to(plan.dtype)
            pairs[f"{tensor.index[0]}.{key}"] = value
            pieces.append(_piece(key, tensor, value))
    common = to_megatron.common_state(plan)
    common["args"] = argparse.Namespace(**vars(common["args"]), **arguments)
    torch_dist.write(folder / "mcore", pieces, plan.objects((0, 0, 0)), common)
    return pairs


def _piece(key: str, tensor: Mapped, value: torch.Tensor) -> torch_dist.Piece:
    size, offset = (*tensor.counts, *value.shape), (*tensor.index, 0, 0)
    return torch_dist.Piece(key, size, offset, (1, *value.shape), value.dtype, lambda: value)


def dense(folder: Path, pairs: dict[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    """The merged Hugging Face tensors: Megatron's weights plus products, taken apart by hand."""
    plan = to_megatron.plan(folder / "hf", to_megatron.Layout())
    values = dict(load_file(folder / "hf" / "model.safetensors"))
    for tensor in plan.tensors:
        key = f"{tensor.index[0] if tensor.index else ''}.{tensor.key.removesuffix('.weight')}"
        if f"{key}.lora_a.weight" not in pairs:
            continue
        a, b = (pairs[f"{key}.lora_{mark}.weight"].double() for mark in "ab")
        whole = take(tensor, tensor.whole, plan.dtype, plan.source.read).double()
        whole += alpha / RANK * b @ a
        for part in tensor.parts:
            rows = whole[part.row : part.row + part.length]
            values[part.name][part.start : part.start + part.length] = rows.to(plan.dtype)
    return values


BOTH, SECOND = (0, 1), (1,)


@pytest.mark.parametrize("layers", [BOTH, SECOND], ids=["all layers", "one layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_merged_weights(tmp_path: Path, layers: tuple[int, ...], dtype: torch.dtype) -> None:
    make(tmp_path / "hf", "Qwen2ForCausalLM", dtype)
    pairs = saved(tmp_path, layers, dr_lora_rank=RANK, dr_lora_alpha=7.0)
    expected = dense(tmp_path, pairs, 7.0)
    argv = ("mcore-to-hf", tmp_path / "mcore", tmp_path / "out", "--config", tmp_path / "hf")
    assert run(*argv) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == dtype
        torch.testing.assert_close(value, expected[name], msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("layers", [BOTH, SECOND], ids=["all layers", "one layer"])
def test_peft_files(tmp_path: Path, layers: tuple[int, ...]) -> None:
    """PEFT's own product, W + alpha / r B A for each Hugging Face matrix, is the merged weight."""
    before = make(tmp_path / "hf", "Qwen3ForCausalLM")
    pairs = saved(tmp_path, layers, dr_lora_rank=RANK)
    expected = dense(tmp_path, pairs, LoRAConfig().alpha)
    argv = ("mcore-to-hf", tmp_path / "mcore", tmp_path / "out", "--config", tmp_path / "hf")
    assert run(*argv, "--adapter") == 0
    values = load_file(tmp_path / "out" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == RANK and config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == str(tmp_path / "hf")
    names = [n.removesuffix(".lora_A.weight") for n in values if n.endswith(".lora_A.weight")]
    assert len(values) == 2 * len(names) == 2 * 7 * len(layers)
    modules = [name.removeprefix("base_model.model.") for name in names]
    ends = {module.rsplit(".", 1)[-1] for module in modules}
    assert config["target_modules"] == sorted(ends if layers == BOTH else modules)
    for name, module in zip(names, modules, strict=True):
        a, b = (values[f"{name}.lora_{mark}.weight"] for mark in "AB")
        found = before[f"{module}.weight"] + config["lora_alpha"] / config["r"] * b @ a
        torch.testing.assert_close(found, expected[f"{module}.weight"])


def test_alpha_that_nobody_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "hf")
    saved(tmp_path, BOTH)
    argv = ("mcore-to-hf", tmp_path / "mcore", tmp_path / "out", "--config", tmp_path / "hf")
    assert run(*argv) == 2
    assert "its arguments don't say their alpha; give --lora-alpha." in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert run(*argv, "--lora-alpha", 5) == 0


def test_a_checkpoint_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "hf")
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "mcore") == 0
    assert run("mcore-to-hf", tmp_path / "mcore", tmp_path / "out", "--adapter") == 2
    assert "--adapter, but it has no adapters." in capsys.readouterr().err
    assert adapters.find(from_megatron.plan(tmp_path / "mcore").reader) is None


def test_an_adapter_of_nothing_is_unknown(tmp_path: Path) -> None:
    """A and B beside no weight of the architecture are refused as any tensor is."""
    make(tmp_path / "hf")
    plan = to_megatron.plan(tmp_path / "hf", to_megatron.Layout())
    pieces = list(plan.pieces((0, 0, 0)))
    key = "decoder.layers.mlp.linear_fc9.lora_a.weight"
    pieces.append(_piece(key, plan.tensors[1], torch.zeros(3, 6)))
    torch_dist.write(tmp_path / "mcore", pieces, {}, to_megatron.common_state(plan))
    with pytest.raises(ValueError, match=f"tensor {key} is unknown to this architecture"):
        from_megatron.plan(tmp_path / "mcore", tmp_path / "hf")


def test_the_base_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the conversion's record, by a flag before it; one that nobody knows is asked for."""
    hub = tmp_path / "models--some--model" / "snapshots"
    hub.mkdir(parents=True)
    make(hub / "0a1b")
    make(tmp_path / "hf")
    saved(tmp_path, BOTH, dr_lora_rank=RANK)
    assert run("hf-to-mcore", hub / "0a1b", tmp_path / "other") == 0
    argv = ("mcore-to-hf", tmp_path / "mcore", "--adapter", "--config")

    def base(out: str, *more: object) -> object:
        assert run(*argv, *more, tmp_path / out) == 0
        text = (tmp_path / out / "adapter_config.json").read_text()
        return json.loads(text)["base_model_name_or_path"]

    assert base("recorded", tmp_path / "other" / "hf") == "some/model"
    assert base("given", tmp_path / "other" / "hf", "--base-model", "mine") == "mine"
    (tmp_path / "other" / "hf" / "base_model.txt").unlink()
    assert run(*argv, tmp_path / "other" / "hf", tmp_path / "nobody") == 2
    assert "name it with --base-model" in capsys.readouterr().err
    assert not (tmp_path / "nobody").exists()


def test_an_adapter_beside_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its configuration alone doesn't travel; with its weights transformers would add it."""
    make(tmp_path / "hf")
    (tmp_path / "hf" / "adapter_config.json").write_text("{}")
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "mcore") == 0
    (tmp_path / "mcore" / "hf" / "adapter_config.json").write_text("{}")  # of an older conversion
    assert run("mcore-to-hf", tmp_path / "mcore", tmp_path / "out") == 0
    assert not list((tmp_path / "out").glob("adapter*"))
    (tmp_path / "hf" / "adapter_model.safetensors").touch()
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "again") == 2
    assert "transformers would add that adapter" in capsys.readouterr().err
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "again") == 2
    assert "only adapter_model.safetensors, an adapter: merge it" in capsys.readouterr().err
