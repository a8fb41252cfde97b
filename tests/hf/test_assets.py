"""What travels with a checkpoint, and the other converter."""

from pathlib import Path

import pytest

from megatron_dr.hf import assets

from ._convert import make, run


def test_a_run_carries_what_it_loaded(tmp_path: Path) -> None:
    make(tmp_path / "hf")
    (tmp_path / "hf" / "additional_chat_templates").mkdir()
    (tmp_path / "hf" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ x }}")
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "mcore") == 0
    (tmp_path / "run" / "hf.partial").mkdir(parents=True)  # of a run that was killed
    (tmp_path / "run" / "hf.partial" / "old.json").touch()
    assets.carry(tmp_path / "mcore", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["hf"]
    top = tmp_path / "run" / "hf"
    names = {str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()}
    assert names == {
        "config.json", "generation_config.json", "tokenizer.json", "megatron_flags.txt",
        "base_model.txt",
        "additional_chat_templates/tool_use.jinja",
    }  # fmt: skip
    for name in names:
        there, here = (tmp_path / place / "hf" / name for place in ("mcore", "run"))
        assert here.read_bytes() == there.read_bytes()


def test_a_run_keeps_its_own(tmp_path: Path) -> None:
    for name in ("mcore", "run"):
        (tmp_path / name / "hf").mkdir(parents=True)
        (tmp_path / name / "hf" / "config.json").write_text(name)
    assets.carry(tmp_path / "mcore", tmp_path / "run")
    assert (tmp_path / "run" / "hf" / "config.json").read_text() == "run"


def test_nothing_to_carry(tmp_path: Path) -> None:
    assets.carry(tmp_path / "nowhere", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_megatron_bridge_where_it_is_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("hf-to-mcore", tmp_path / "hf", tmp_path / "out", "--backend", "megatron-bridge")
    assert run(*argv) == 2
    assert "needs the package megatron-bridge, which can't be imported" in capsys.readouterr().err
    assert run(*argv, "--tp", 2) == 2
    assert "does not know --tp: drop the flag." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
