"""The commands of docs/data.md that prepare data run, and write what the text says."""

import re
import subprocess
from pathlib import Path

import pytest

from megatron_dr.cli.prepare import main
from megatron_dr.data.encode import COLUMNS, FORMS

from ._prepare import ROOT, documents

TEXT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """The indented lines that begin a command, continued lines joined; others are flags, equations
    and tables."""
    code = re.sub(r" *\\\n *", " ", "\n".join(re.findall(r"^    (.*)$", TEXT, re.M)))
    begins = ("megatron-dr ", "torchrun ", "head ", "sed ")
    return [line.split() for line in code.splitlines() if line.startswith(begins)]


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    prepared = 0
    for words in commands():
        if words[:2] == ["megatron-dr", "prepare"]:
            main([*words[2:], "--workers", "1"])
            prepared += 1
        elif words[0] in ("head", "sed"):
            subprocess.run(" ".join(words), shell=True, check=True)
        else:
            assert words[0] == "torchrun"
            given = [words[words.index(f"--{flag}") + 1] for flag in ("train-data-path",
                     "valid-data-path", "dr-target-data")]  # fmt: skip
    assert prepared == 4
    sizes = [len(documents(tmp_path / path)) for path in given]
    assert sizes[1] == 200 and sum(sizes[:2]) == 6000
    assert len(documents(tmp_path / "runs/data/one")) == 1


def test_every_flag_column_and_form_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    flags = re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.M)
    assert len(flags) > 10
    for name in {*flags, *COLUMNS, *FORMS}:
        assert name in TEXT, name
