"""The command `megatron-dr` and the scripts of tools/ with the names of its sub-commands."""

import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_dr.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[1]


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=200,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "100"},
    )  # fmt: skip


def test_help_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name, what in COMMANDS.items():
        assert f" {name} {what} " in said


@pytest.mark.parametrize("words", [[], ["no_such"]])
def test_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "COMMAND" in capsys.readouterr().err


SCRIPTS = {name: ROOT / "tools" / f"{name.replace('-', '_')}.py" for name in COMMANDS}
SLOW = [pytest.param(n, marks=() if n == "gpu-check" else pytest.mark.soak) for n in COMMANDS]


def helped(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_helps_and_has_a_script(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert helped(name, capsys).startswith(f"usage: megatron-dr {name} [-h]")
    assert f"megatron_dr.cli.{SCRIPTS[name].stem} import main" in SCRIPTS[name].read_text()


def test_there_are_no_other_scripts() -> None:
    own = ROOT / "tools" / "sbom.py"  # of a release, not of a user
    assert {*(ROOT / "tools").glob("*.py")} == {*SCRIPTS.values(), own}


@pytest.mark.parametrize("name", SLOW)
def test_a_command_by_its_three_names(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Here, as a module, and as a script; lines are broken as a terminal is wide."""
    said = "".join(helped(name, capsys).split())
    for words in (("-m", "megatron_dr", name), (SCRIPTS[name],)):
        assert "".join(run(*words, "--help").stdout.split()) == said


def test_without_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, and the others still run."""
    monkeypatch.delitem(sys.modules, "megatron_dr.cli.prepare", raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(SystemExit, match="megatron-dr prepare: .*rich.*see megatron-dr doctor"):
        main(["prepare"])


def test_the_exit_code(tmp_path: Path) -> None:
    done = run("-m", "megatron_dr", "convert", "mcore-to-hf", tmp_path / "none", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.startswith("convert: error: ")
    assert done.stderr.count("\n") == 1


def test_the_command_is_installed_by_its_name() -> None:
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert pkgutil.resolve_name(script["megatron-dr"]) is main
