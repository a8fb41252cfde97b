"""Checkpoints on disk, there and back by the command line: exact, complete, or refused."""

import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dr.hf import to_megatron, torch_dist
from megatron_dr.hf.families import FAMILIES

from ._convert import make, run


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[k].dtype == v.dtype and found[k].equal(v) for k, v in expected.items()
    )


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_round_trip_of_a_family(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    values = make(tmp_path / "hf", name, dtype)
    layout = "--tp 2 --pp 2" + (" --ep 2" if FAMILIES[name].experts_key else "")
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "mcore", *layout.split()) == 0
    assert run("mcore-to-hf", tmp_path / "mcore", tmp_path / "back") == 0
    assert same(load_file(tmp_path / "back" / "model.safetensors"), values)
    told = json.loads((tmp_path / "back" / "config.json").read_text())
    assert told["torch_dtype"] == str(dtype)[6:]
    for file in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "back" / file).read_text() == (tmp_path / "hf" / file).read_text()


def test_several_files_with_an_index(tmp_path: Path) -> None:
    values = make(tmp_path / "hf")
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "mcore") == 0
    many = ["--file-size", 2e-6]  # 2 kB
    assert run("mcore-to-hf", tmp_path / "mcore", tmp_path / "many", *many) == 0
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in values.values())
    assert run("hf-to-mcore", tmp_path / "many", tmp_path / "again") == 0  # reads an index, too
    assert run("mcore-to-hf", tmp_path / "again", tmp_path / "one") == 0
    assert same(load_file(tmp_path / "one" / "model.safetensors"), values)


def test_one_file_counts_before_an_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in transformers, whose rule it is; the folder is told of."""
    values = make(tmp_path / "hf")
    old = {name: value + 1 for name, value in values.items()}
    save_file(old, tmp_path / "hf" / "old.safetensors")
    index = {"weight_map": dict.fromkeys(old, "old.safetensors")}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(old, tmp_path / "hf" / "pytorch_model.bin")
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "mcore") == 0
    assert "model.safetensors and model.safetensors.index.json are both" in capsys.readouterr().out
    assert run("mcore-to-hf", tmp_path / "mcore", tmp_path / "back") == 0
    assert same(load_file(tmp_path / "back" / "model.safetensors"), values)


def test_dtype_is_chosen(tmp_path: Path) -> None:
    values = make(tmp_path / "hf")
    narrow = {name: value.bfloat16() for name, value in values.items()}
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "mcore", "--dtype", "bf16") == 0
    assert run("mcore-to-hf", tmp_path / "mcore", tmp_path / "back") == 0
    assert same(load_file(tmp_path / "back" / "model.safetensors"), narrow)


def test_what_megatron_asks_for_is_written(tmp_path: Path) -> None:
    make(tmp_path / "hf", vocab_size=101)
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "out", "--tp", 2) == 0
    out = tmp_path / "out"
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "release"
    common = torch_dist.Reader(out / "release").common()
    assert common["checkpoint_version"] == 3.0 and common["iteration"] == 0
    args = common["args"]
    assert (args.num_layers, args.tensor_model_parallel_size, args.padded_vocab_size) == (2, 2, 256)
    assert "--num-layers 2" in (out / "hf" / "megatron_flags.txt").read_text()
    assert not (tmp_path / "out.partial").exists()


def test_only_one_piece_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "hf")
    counts = {"alive": 0, "most": 0, "made": 0}
    original = to_megatron.take

    def freed() -> None:
        counts["alive"] -= 1

    def counting(*args: Any) -> torch.Tensor:
        made = original(*args)
        weakref.finalize(made.untyped_storage(), freed)
        counts["alive"] += 1
        counts["made"] += 1
        counts["most"] = max(counts["most"], counts["alive"])
        return made

    monkeypatch.setattr(to_megatron, "take", counting)
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "out") == 0
    assert counts["made"] > 15 and counts["alive"] == 0
    assert counts["most"] == 1


def test_the_plan_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = make(tmp_path / "hf", vocab_size=101)
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "out", "--pp", 2) == 0
    said = capsys.readouterr().out
    assert f"{len(values)} tensors, written as float32" in said
    assert "vocabulary 101, padded to 128" in said
    assert "processes write" in said and f"--load {tmp_path / 'out'} --num-layers 2" in said


def spoil(folder: Path, change: Any) -> None:
    values = load_file(folder / "model.safetensors")
    change(values)
    save_file(values, folder / "model.safetensors")


SPOILT = {
    "missing": (lambda v: v.pop("model.norm.weight"), "tensor model.norm.weight is missing"),
    "unknown": (
        lambda v: v.update({"model.layers.0.self_attn.sinks": torch.ones(4)}),
        "tensor model.layers.0.self_attn.sinks is unknown",
    ),
    "shape": (
        lambda v: v.update({"model.norm.weight": torch.ones(3)}),
        "model.norm.weight has shape [3]",
    ),
    "dtypes": (
        lambda v: v.update({"model.norm.weight": v["model.norm.weight"].half()}),
        "tensors are float16, float32; choose one with --dtype",
    ),
    "integers": (
        lambda v: v.update({"model.norm.weight": v["model.norm.weight"].to(torch.int8)}),
        "model.norm.weight is I8",
    ),
}


@pytest.mark.parametrize("change, sentence", SPOILT.values(), ids=SPOILT.keys())
def test_wrong_tensors_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, sentence: str
) -> None:
    make(tmp_path / "hf")
    spoil(tmp_path / "hf", change)
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_tied_model_may_carry_its_output_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "hf", tie_word_embeddings=True)
    embedding = "model.embed_tokens.weight"
    spoil(tmp_path / "hf", lambda v: v.update({"lm_head.weight": v[embedding].clone()}))
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "out") == 0
    spoil(tmp_path / "hf", lambda v: v["lm_head.weight"].mul_(1.5))
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "other") == 2
    assert "but lm_head.weight differs" in capsys.readouterr().err


def test_computed_buffers_are_left_out(tmp_path: Path) -> None:
    make(tmp_path / "hf")
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    spoil(tmp_path / "hf", lambda v: v.update({buffer: torch.ones(2)}))
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "out") == 0


def test_pickles_are_read_only_when_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = make(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(values, tmp_path / "hf" / "pytorch_model.bin")
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "out") == 2
    assert "give --allow-pickle" in capsys.readouterr().err
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "out", "--allow-pickle") == 0
    assert run("mcore-to-hf", tmp_path / "out", tmp_path / "back") == 0
    assert same(load_file(tmp_path / "back" / "model.safetensors"), values)


def test_no_weights_and_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "out") == 2
    assert "no model.safetensors" in capsys.readouterr().err
    assert run("mcore-to-hf", tmp_path / "hf", tmp_path / "out") == 2
    assert "no torch_dist checkpoint" in capsys.readouterr().err


LAYOUTS = {
    "pp": (("--pp", 3), "2 layers can't be divided into --pp 3"),
    "tp": (("--tp", 3), "4 heads can't be divided into --tp 3"),
    "ep": (("--ep", 2), "1 experts can't be divided into --ep 2"),
}


@pytest.mark.parametrize("layout, sentence", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_impossible_layouts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: Any, sentence: str
) -> None:
    make(tmp_path / "hf")
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "out", *layout) == 2
    assert sentence in capsys.readouterr().err


def test_output_is_not_overwritten_and_never_half_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "out") == 2
    assert "exists already" in capsys.readouterr().err

    def broken(*args: Any) -> torch.Tensor:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(to_megatron, "take", broken)
        with pytest.raises(CheckpointException, match="disk full"):
            run("hf-to-mcore", tmp_path / "hf", tmp_path / "new")
    assert not (tmp_path / "new").exists() and (tmp_path / "new.partial").exists()
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "new") == 0  # the remains don't matter
    assert not (tmp_path / "new.partial").exists()


def test_a_checkpoint_without_its_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = make(tmp_path / "hf")
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "mcore") == 0
    (tmp_path / "mcore" / "hf").rename(tmp_path / "away")
    assert run("mcore-to-hf", tmp_path / "mcore", tmp_path / "back") == 2
    assert "name its folder with --config" in capsys.readouterr().err
    found = run("mcore-to-hf", tmp_path / "mcore", tmp_path / "back", "--config", tmp_path / "hf")
    assert found == 0
    assert same(load_file(tmp_path / "back" / "model.safetensors"), values)


def test_another_models_config_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "hf")
    make(tmp_path / "other", rope_theta=5e5)
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "out") == 0
    wrong = ("--config", tmp_path / "other")
    assert run("mcore-to-hf", tmp_path / "out", tmp_path / "back", *wrong) == 2
    assert "rotary_base 10000, but its config.json means 500000" in capsys.readouterr().err


def test_shards_divide_stages_ranks_and_experts(tmp_path: Path) -> None:
    """Every element is some shard's, and a shard has its own layers and experts alone."""
    make(tmp_path / "hf", "MixtralForCausalLM", num_local_experts=4)
    plan = to_megatron.plan(tmp_path / "hf", to_megatron.Layout(2, 2, 2))
    sizes, found = {}, {}
    for stage, rank, expert in plan.layout.shards():
        for piece in plan.pieces((stage, rank, expert)):
            sizes[piece.key] = math.prod(piece.size)
            found[piece.key] = found.get(piece.key, 0) + math.prod(piece.shape)
            if piece.key.startswith("decoder.layers."):
                assert piece.offset[0] == stage
            if ".experts." in piece.key:
                assert piece.offset[1] // 2 == expert
            elif piece.key.startswith("decoder."):
                assert expert == 0
    assert found == sizes
