"""Who samples are: file, line, id and content, of files and of prepared datasets."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_dr.data.file_samples import FileSamples
from megatron_dr.data.identities import Sources, content, of_tokens
from megatron_dr.data.pairs import FilePairs

from ._tokenizer import ByteTokenizer


def test_samples_of_a_folder_know_their_lines(tmp_path: Path) -> None:
    records = [{"text": "a", "id": "first"}, {"text": "b", "id": 7}, {"text": "c", "id": None}]
    (tmp_path / "a.jsonl").write_text(json.dumps(records[0]) + "\n\n" + json.dumps(records[1]))
    (tmp_path / "b.jsonl").write_text(json.dumps(records[2]) + "\n")
    samples = FileSamples(str(tmp_path), ByteTokenizer(), 8)
    found = [samples.identity(number) for number in range(3)]
    names = [str(tmp_path / name) for name in ("a.jsonl", "a.jsonl", "b.jsonl")]
    assert [(one.file, one.line, one.id) for one in found] == [
        (names[0], 1, "first"), (names[1], 3, "7"), (names[2], 1, None)
    ]  # fmt: skip
    assert [one.hash for one in found] == [content(each) for each in records]


def test_a_pair_is_known_by_its_record(tmp_path: Path) -> None:
    record = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    found = FilePairs(str(tmp_path / "a.jsonl"), ByteTokenizer(), 16).identity(0)
    assert (found.line, found.hash) == (1, content(record))


def test_content_is_of_what_a_record_says() -> None:
    assert content({"a": 1, "b": "é"}) == content(json.loads('{ "b": "\\u00e9",\n"a":1}'))
    assert content({"a": 1}) != content({"a": "1"})
    assert of_tokens(np.array([1, 2], np.uint16)) == of_tokens([1, 2]) != of_tokens([2, 1])


@pytest.mark.parametrize("part", ["", "_chosen"])
def test_a_prepared_dataset_knows_where_it_is_from(tmp_path: Path, part: str) -> None:
    assert Sources(str(tmp_path / "p")).place(0) == (None, None)
    manifest = {"files": [{"path": "x.jsonl", "sha256": "ff"}, {"path": "y.jsonl", "sha256": "00"}]}
    (tmp_path / "p.json").write_text(json.dumps(manifest))
    np.save(tmp_path / "p_source.npy", np.array([[1, 5], [0, 2]]))
    sources = Sources(str(tmp_path / f"p{part}"))
    assert [sources.place(n) for n in range(3)] == [("y.jsonl", 5), ("x.jsonl", 2), (None, None)]
    assert sources.hashes == {"x.jsonl": "ff", "y.jsonl": "00"}
