"""Which tensors verify names; its exit codes and logits are in tests/mcore/test_convert.py."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dr.cli import verify
from megatron_dr.hf import from_megatron
from megatron_dr.hf.source import Source

from ._convert import make, run


def test_tensors_are_named(tmp_path: Path) -> None:
    """One that is changed, missing, of another shape, or read otherwise by transformers."""
    values = make(tmp_path / "hf", "Qwen2ForCausalLM")
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "mcore") == 0
    export = from_megatron.plan(tmp_path / "mcore")
    source = Source(tmp_path / "hf")
    assert verify.unfit_tensors(source, export) == {}
    assert verify.differing_tensors(source, export) == []
    theirs = dict(values)
    assert verify.misread_tensors(source, Namespace(state_dict=lambda: theirs)) == []
    name = "model.layers.0.self_attn.k_proj.weight"
    theirs[name] = values[name] + 1
    found = verify.misread_tensors(source, Namespace(state_dict=lambda: theirs))
    assert found == [f"{name} (as transformers reads {tmp_path / 'hf'})"]
    other = load_file(tmp_path / "hf" / "model.safetensors")
    other[name][1, 2] += 1
    del other["model.norm.weight"]
    other["model.layers.1.input_layernorm.weight"] = torch.ones(3)
    save_file(other, tmp_path / "hf" / "model.safetensors")
    source = Source(tmp_path / "hf")
    assert verify.differing_tensors(source, export) == [name]
    assert verify.unfit_tensors(source, export) == {
        "model.norm.weight": f"not in {tmp_path / 'hf'}",
        "model.layers.1.input_layernorm.weight": "[3], in the checkpoint [10]",
    }


@pytest.mark.parametrize("tolerance", ["inf", "nan", "1", "-1e-4"])
def test_a_tolerance_that_tells_nothing(tolerance: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        verify.arguments(["hf", "checkpoint", f"--tolerance={tolerance}"])
    assert ended.value.code == 2
    assert "--tolerance must be at least 0 and below 1" in capsys.readouterr().err
