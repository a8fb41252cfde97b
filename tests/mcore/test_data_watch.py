"""Files that are read as a run goes: what happens to them is said, once."""

import os
from pathlib import Path

import pytest

from megatron_dr.mcore.loop.data_watch import DataWatch


def test_what_is_changed_or_gone_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 3)
    files = [tmp_path / f"{name}.bin" for name in ("same", "longer", "touched", "other", "gone")]
    for file in files:
        file.write_bytes(b"0123")
        os.utime(file, ns=(1, 1))
    watch = DataWatch(files)
    watch.look(1)
    assert capsys.readouterr().out == ""
    same, longer, touched, other, gone = files
    longer.write_bytes(b"01234")
    touched.write_bytes(b"3210")
    (tmp_path / "new").write_bytes(b"0123")
    (tmp_path / "new").rename(other)
    os.utime(other, ns=(1, 1))
    gone.unlink()
    watch.look(7)
    said = capsys.readouterr().out.splitlines()
    expected = {
        longer: "was changed",
        touched: "was changed",
        other: "was changed",
        gone: "is gone",
    }
    assert len(said) == len(expected)
    for line, (file, what) in zip(said, expected.items(), strict=True):
        assert line.startswith(f"megatron_dr: WARNING: {file} {what} while the run reads it")
        assert "iteration 7, on rank 3" in line
    watch.look(8)
    assert capsys.readouterr().out == ""
    assert same.exists()
