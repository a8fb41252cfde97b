"""What a folder of data holds: every kind of file, compressed, below it; the rest is named."""

import gzip
import json
import os
from pathlib import Path

import pytest

from megatron_dr.data import files, records
from megatron_dr.data.file_samples import read


def line(n: int) -> dict[str, str]:
    return {"text": f"number {n}"}


def lines(*numbers: int) -> bytes:
    return b"".join(json.dumps(line(n)).encode() + b"\n" for n in numbers)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Records 0 to 13 in order of names, and what is no data."""
    held = {
        "PART-0.JSONL": lines(0, 1), "b.jsonl.gz": gzip.compress(lines(2, 3)), "c.json": lines(4),
        "d.json": json.dumps([line(5), line(6)], indent=1).encode(),
        "e/deep/a.jsonl": lines(7), "e/z.JSON.GZ": gzip.compress(json.dumps([line(8)]).encode()),
        "f.jsonl": lines(9, 10), "README.md": b"#", "e/notes.txt": b"", ".hidden.jsonl": b"{",
        ".cache/x.jsonl": b"{", "dataset_info.json": b"{}", "e/part.jsonl.zst": b"",
    }  # fmt: skip
    for name, content in held.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    os.symlink(tmp_path / "data", tmp_path / "data" / "e" / "again")
    return tmp_path / "data"


def test_all_that_is_data_is_read(folder: Path) -> None:
    found = list(read(str(folder)))
    assert [record for _, record in found] == [line(n) for n in range(11)]
    places = [where.removeprefix(f"{folder}/") for where, _ in found]
    assert places == ["PART-0.JSONL:1", "PART-0.JSONL:2", "b.jsonl.gz:1", "b.jsonl.gz:2",
                      "c.json:1", "d.json:1", "d.json:2", "e/deep/a.jsonl:1", "e/z.JSON.GZ:1",
                      "f.jsonl:1", "f.jsonl:2"]  # fmt: skip
    for where, record in found:  # each by itself too
        path, _, number = where.rpartition(":")
        assert dict(read(path))[where] == record and int(number)


def test_what_is_passed_over_is_named(folder: Path) -> None:
    note = files.passed_over([str(folder), str(folder / "f.jsonl")])
    assert note == (
        f"{folder}: passed over .cache/, .hidden.jsonl, README.md, dataset_info.json, e/again/ "
        "and 2 more"
    )
    assert files.passed_over([str(folder / "e" / "deep")]) is None


def test_pieces_make_the_whole(folder: Path) -> None:
    """Of one line each; a gzip file in few, since each is unpacked from its beginning."""
    (folder / "many.jsonl.gz").write_bytes(gzip.compress(lines(*range(300))))
    for name, size in (("many.jsonl.gz", 60), ("f.jsonl", 2), ("d.json", 1)):
        found = records.inspect(0, str(folder / name), 1)
        assert len(found.pieces) == size and found.records == sum(p.count for p in found.pieces)
        read_by_piece = [pair for piece in found.pieces for pair in records.read(piece)]
        assert read_by_piece == list(records.read_file(str(folder / name)))
        assert [n for n, _ in read_by_piece] == list(range(1, found.records + 1))


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.jsonl.gz", gzip.compress(lines(*range(99)))[:-20], "not a whole gzip file"),
        ("a.jsonl.gz", lines(1), "not a whole gzip file"),
        ("a.json", b'[{"text": "a"}, ', "a.json: not JSON (Expecting value, line 1, column 17)"),
        ("a.json", b'[{"text": "a"}, 3]', "a.json:2: a record must be a JSON object, not int"),
        ("a.json", b'{\n "text": "a"\n}', "a.json:1: not JSON"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        list(read(str(tmp_path / name)))
    assert sentence in str(error.value) and str(tmp_path) in str(error.value)


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"or another that ends in .*it has a\.csv"):
        files.list_files([str(tmp_path)])


def test_a_state_that_is_data(tmp_path: Path) -> None:
    """A dataset on disk has a state.json, but not each state.json is of one."""
    (tmp_path / "state.json").write_bytes(lines(1))
    assert [record for _, record in read(str(tmp_path))] == [line(1)]
