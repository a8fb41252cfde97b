"""LoRA by its flags, in Megatron's own training loop."""

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from ._ranks import run_ranks
from ._train import cone, data, flags, losses, run

__all__ = ["data"]
LORA = "--dr-lora-rank 4 --dr-lora-alpha 8 --dr-lora-dropout 0.1"


def weights(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, without the optimizer's."""
    path = str(folder / f"iter_{iteration:07d}")
    (whole,) = run_ranks(1, dist_checkpointing.load_plain_tensors, path)
    return {n: v for n, v in whole.items() if torch.is_tensor(v) and not n.startswith("optim")}


@pytest.mark.soak
def test_adapters_start_on_a_model_without_and_resume(data: dict[str, str], tmp_path: Path) -> None:
    """Only they change, at TP 2; a resumed run equals an uninterrupted one."""
    base, whole, parts = tmp_path / "base", tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    padding = "--make-vocab-size-divisible-by 136"
    assert run(flags(data, f"{padding} --save {base} --save-interval 1", 1), 1)[0][0] == 0
    layout = f"""{padding} {cone(data)} {LORA} --dr-slots 4 --tensor-model-parallel-size 2
        --sequence-parallel --finetune --pretrained-checkpoint {base} --ckpt-fully-parallel-save"""
    code, out, error = run(flags(data, f"{layout} --dr-metrics {whole}"))[0]
    assert code == 0, error
    assert "LoRA of rank 4 on 8 layers: 3,200 parameters are trained, the model is frozen" in out
    layout = layout.replace("--finetune", "")
    saved = f"{layout} --dr-metrics {parts} --load {tmp_path / 's'} --save {tmp_path / 's'}"
    saved += " --save-interval 3"
    assert run(flags(data, f"{saved} --exit-interval 3"))[0][0] == 0
    code, _, error = run(flags(data, saved))[0]
    assert code == 0, error
    expected, found = losses(whole, "train"), losses(parts, "train")
    assert list(found) == list(expected) == [1, 2, 3, 4, 5, 6]
    for step in expected:
        assert found[step] == pytest.approx(expected[step], rel=1e-6)
    before, third, last = weights(base, 1), weights(tmp_path / "s", 3), weights(tmp_path / "s", 6)
    for name, value in last.items():
        if ".lora_" in name:
            assert not torch.equal(value, third[name]), name
        else:
            assert torch.equal(value, before[name]), name
    assert len(last) > len(before) > 5


BAD = {
    "targets": (
        "--dr-lora-rank 4 --dr-lora-targets q_proj",
        "targets 'q_proj' match none of the model's layers, whose names end in linear_fc1",
    ),
    "no rank": ("--dr-lora-alpha 4", "--dr-lora-alpha needs --dr-lora-rank"),
    "dropout": ("--dr-lora-rank 4 --dr-lora-dropout 1.5", "dropout must be in [0, 1), not 1.5."),
}


@pytest.mark.parametrize("more, sentence", BAD.values(), ids=BAD.keys())
def test_bad_flags_are_one_sentence(data: dict[str, str], more: str, sentence: str) -> None:
    (first, out, error), (second, _, other) = run(flags(data, more))
    said = [line for line in error.splitlines() if line.startswith("megatron_dr: error: ")]
    assert len(said) == 1 and sentence in said[0], (said, error[-2000:])
    assert first == second == 2 and "megatron_dr: error" not in other
    assert "iteration        1/" not in out
