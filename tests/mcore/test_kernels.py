"""NVIDIA's apex is told from others of its name by what it has."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_dr.mcore.loop import kernels


def test_whose_apex(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert kernels.apex() == "no NVIDIA apex"
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it is never imported')")
    other = f"the package apex at {package} is not NVIDIA's, though Megatron takes it for that"
    assert kernels.apex() == f"{other}: remove it"
    (package / "multi_tensor_apply").mkdir()
    assert kernels.apex() == "NVIDIA apex found without its CUDA extensions"
    (tmp_path / "amp_C.py").touch()
    assert kernels.apex() == "NVIDIA apex found, without fused gradient accumulation"
    (tmp_path / "fused_weight_gradient_mlp_cuda.py").touch()
    assert kernels.apex() == "NVIDIA apex found"


def test_a_transformer_engine_that_breaks(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))  # has no __spec__
    assert kernels.transformer_engine() == "no Transformer Engine"
    assert kernels.apex() == "no NVIDIA apex"
    (tmp_path / "transformer_engine.py").write_text("raise ImportError")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert "installed but can't be imported" in kernels.transformer_engine()
