"""The limits end what would hang, and give back the clock that was set before."""

import os
import signal

import pytest

from . import _cases


def test_a_blocked_read_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cases, "WAITED", 0.2)
    held = signal.getitimer(signal.ITIMER_REAL)
    end, kept = os.pipe()
    try:
        signal.setitimer(signal.ITIMER_REAL, 50)  # as pytest-timeout does
        with pytest.raises(_cases.Slow), _cases.bounded():
            os.read(end, 1)
        assert 40 < signal.getitimer(signal.ITIMER_REAL)[0] < 50
    finally:
        signal.setitimer(signal.ITIMER_REAL, *held)
        os.close(end)
        os.close(kept)
