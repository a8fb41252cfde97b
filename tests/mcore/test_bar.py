"""A terminal has a progress bar of the steps; a file has Megatron's lines alone."""

import io
import sys

import pytest

from megatron_dr.mcore.loop import train

from . import _train
from ._ranks import run_ranks

data = _train.data  # a fixture


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _on_a_terminal(argv: list[str], stdout: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    """On a rank: what the run printed."""
    out = _Terminal() if stdout else io.StringIO()
    for name, value in {"TERM": "xterm", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["megatron_dr.train", *argv])
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", _Terminal())
    train.main()
    return out.getvalue()


@pytest.mark.parametrize("stdout", [True, False])
def test_bar(data: dict[str, str], stdout: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = _train.flags(data, _train.unjudged(data), iterations=3)
    out = run_ranks(1, _on_a_terminal, argv, stdout, monkeypatch)[0]
    for step in (0, 1, 3):
        assert (f"{step}/3" in out) is stdout
    assert "iteration        3/       3 |" in out and ("\x1b" in out) is stdout
