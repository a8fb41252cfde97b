"""The files of a record: whole or not there, no step twice, and what is refused."""

import os
from pathlib import Path

import pyarrow.parquet
import pytest

from megatron_dr.report import record
from megatron_dr.report.record import SCHEMA, Writer, about, read

from ._record import add, row, written


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rows = [row(1, 0, 1.5, score=-0.25, file="a.jsonl", line=3, id="x", hash="text:00"),
            row(1, 7, float("nan"), kind="slot")]  # fmt: skip
    found = read(written(tmp_path / "new" / "r", rows, left_out=3, **{"a.jsonl": "ff"}))
    assert found.schema.equals(SCHEMA)
    assert found.slice(0, 1).to_pylist() == rows[:1]
    nan = found.to_pylist()[1]
    assert nan["weight"] != nan["weight"] and nan["score"] is None  # not 0, not null
    assert about(found) == {"left_out": 3, "files": {"a.jsonl": "ff"}}


def test_files_are_of_many_steps_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "_STEPS", 4)
    writer = Writer(tmp_path)
    for step in range(1, 11):
        add(writer, [row(step, 0, 1.0)], left_out=1)
    assert [path.name for path in record.files(tmp_path)] == [
        "000000001-000000004.parquet", "000000005-000000008.parquet"
    ]  # fmt: skip
    writer.flush()
    writer.flush()  # nothing is left
    found = read(tmp_path)
    assert found["step"].to_pylist() == [*range(1, 11)] and about(found)["left_out"] == 10


@pytest.mark.parametrize(
    "after, kept", [(3, [1, 2, 3]), (2, [1, 2]), (1, [1]), (0, []), (9, [1, 2, 3, 4])]
)
def test_a_resumed_run_has_no_step_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, kept: list[int]
) -> None:
    monkeypatch.setattr(record, "_STEPS", 2)
    written(tmp_path, [])
    writer = Writer(tmp_path)
    for step in range(1, 5):
        add(writer, [row(step, 0, 1.0), row(step, 1, 2.0)])
    (tmp_path / "5.parquet.tmp").write_text("of a crash")
    again = Writer(tmp_path, after)
    assert again.cut == 2 * (4 - len(kept))
    for step in (10, 11):
        add(again, [row(step, 0, 1.0)])
    steps = read(tmp_path)["step"].to_pylist()
    assert steps == [step for step in kept for _ in range(2)] + [10, 11]
    assert not [*tmp_path.glob("*.tmp")]


def test_what_cannot_be_written_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    writer, replace = Writer(tmp_path), os.replace

    def full(*paths: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    for step in (1, 2):
        add(writer, [row(step, 0, 1.0)])
        writer.flush()
    said = capsys.readouterr().err
    assert said.count("No space left on device") == 1 and "the run goes on" in said
    assert [*tmp_path.iterdir()] == []  # nothing half written
    monkeypatch.setattr(os, "replace", replace)
    add(writer, [row(3, 0, 1.0)])
    writer.flush()
    assert read(tmp_path)["step"].to_pylist() == [3]


def test_a_folder_that_is_no_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no record is there"):
        read(tmp_path / "nowhere")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    for opened in (read, Writer):
        with pytest.raises(ValueError, match="a.parquet: no record of weights .* text"):
            opened(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="a.parquet: can't be read"):
        read(tmp_path)


def test_a_folder_that_a_run_cannot_have(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--dr-record .*file/r: can't be written"):
        Writer(tmp_path / "file" / "r")
    folder = written(tmp_path / "r", [row(1, 0, 1.0)])
    with pytest.raises(ValueError, match="the record of another run is there"):
        Writer(folder, is_new=True)
    assert len(read(folder)) == 1
