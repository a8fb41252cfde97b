"""Lines of JSON, tables and folders of them, as samples, pairs, prompts and questions."""

import functools
import gzip
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import strategies as st

from megatron_dr.data import files, records
from megatron_dr.data.chat import Chat
from megatron_dr.data.file_samples import FileSamples
from megatron_dr.data.pairs import FilePairs
from megatron_dr.rl.prompts import read_asked, read_prompts
from tests.data import _chat
from tests.data._tokenizer import HuggingFace

from ._cases import HALF, Raw, damaged, dumped, fuzzed, refused, trees

_USER, _ANSWER = {"role": "user", "content": "how?"}, {"role": "assistant", "content": "so"}
_CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"type": "function", "function": {"name": "clock", "arguments": {"zone": [1, None]}}}
]}  # fmt: skip
_PARTS = {
    "role": "assistant",
    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
}
SAMPLES = [
    {"text": "some words"},
    {"prompt": "one and", "response": " two", "id": "x1"},
    {"messages": [_USER, _ANSWER], "tools": []},
    {"messages": [{"role": "system", "content": "Be."}, _USER, _PARTS]},
    {"messages": [_USER, _CALL, {"role": "tool", "content": "4"}, _ANSWER],
     "tools": [{"name": "t"}]},
]  # fmt: skip
PAIRS = [
    {"prompt": "one and", "chosen": " two", "rejected": " three"},
    {"chosen": [_USER, _ANSWER], "rejected": [_USER, _ANSWER | {"content": "no"}]},
    {"prompt": [_USER], "chosen": [_ANSWER], "rejected": [_PARTS]},
]
PROMPTS = [
    {"prompt": "one and", "answer": "two", "id": 5},
    {"prompt": [_USER], "answer": {"value": [2, 3.5, None]}, "level": "easy"},
]


@functools.cache
def tokenizer() -> tuple[HuggingFace, Chat]:
    found = HuggingFace(_chat.fast(_chat.CHATML))
    return found, Chat(found.hf)


def samples(path: str) -> Any:
    return FileSamples(path, tokenizer()[0], 100, tokenizer()[1])


def pairs(path: str) -> Any:
    return FilePairs(path, tokenizer()[0], 100, tokenizer()[1])


def prompts(path: str) -> Any:
    return read_prompts([path], tokenizer()[0], 100, tokenizer()[1])


def asked(path: str) -> Any:
    return read_asked(path, tokenizer()[0], 100, tokenizer()[1])


READ = {"samples": samples, "pairs": pairs, "prompts": prompts, "asked": asked}
_OF = {"samples": SAMPLES, "pairs": PAIRS, "prompts": PROMPTS, "asked": SAMPLES}


def read_record(case: tuple[str, Any]) -> None:
    """A good line, and one that is not: the sentence names file and line."""
    form, record = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.jsonl")
        path.write_bytes(dumped(_OF[form][1]) + b"\n" + dumped(record) + b"\n")
        refused(lambda: READ[form](str(path)), f"{path}:2: ")


_RECORDS = st.sampled_from([*READ]).flatmap(lambda form: st.tuples(st.just(form), trees(_OF[form])))
FAILED_RECORDS: list[Any] = [
    ("samples", {"messages": [_USER, _ANSWER], "tools": Raw("[" * 900 + "]" * 900)}),
    ("samples", {"messages": [_USER, _ANSWER | {"x": Raw("[" * 400 + "]" * 400)}]}),
    ("samples", {"text": "a", "x": Raw("[" * 1200 + "]" * 1200)}),
    ("prompts", {"prompt": "a", "answer": Raw("[" * 990 + "]" * 990)}),
    ("prompts", {"prompt": HALF, "answer": 1}),
    ("asked", {"messages": [_USER, _ANSWER], "answer": Raw("1" * 5000)}),
    ("samples", {"messages": [_USER, _ANSWER | {"role": HALF}]}),
    ("samples", {"messages": [_USER, _PARTS | {"content": [{"type": "text", "text": HALF}]}]}),
    ("samples", {"messages": [_USER, {"role": "assistant", "contents": "typo"}]}),
    ("samples", {"messages": [_USER, _ANSWER], "tools": [{"name": HALF}]}),
    (
        "samples",
        {
            "messages": [
                _USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": HALF}}],
                },
            ]
        },
    ),
]
test_record, test_record_long = fuzzed(read_record, _RECORDS, 100, 5000, FAILED_RECORDS)


def lines_of(records_: list[Any]) -> bytes:
    return b"".join(dumped(record) + b"\n" for record in records_)


def read_bytes(case: tuple[str, str, bytes]) -> None:
    form, ending, content = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a{ending}")
        path.write_bytes(content)
        refused(lambda: READ[form](str(path)), path)


def _packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def _array(of: list[Any]) -> bytes:
    return json.dumps(of, indent=1).encode()


_BYTES = st.sampled_from([*READ]).flatmap(lambda form: st.one_of(
    st.tuples(st.just(form), st.sampled_from([".jsonl", ".json"]), damaged([lines_of(_OF[form])])),
    st.tuples(st.just(form), st.just(".json"), damaged([_array(_OF[form])])),
    st.tuples(st.just(form), st.just(".jsonl.gz"), damaged([_packed(lines_of(_OF[form]))])),
    st.tuples(st.just(form), st.just(".json.gz"), damaged([_packed(_array(_OF[form]))])),
))  # fmt: skip
FAILED_BYTES: list[Any] = [
    ("samples", ".jsonl", b"\xef\xbb\xbf" + lines_of(SAMPLES)),
    ("samples", ".jsonl", lines_of(SAMPLES).replace(b"\n", b"\r\n")),
    ("samples", ".jsonl", b""),
    ("samples", ".json", b"[" * 100_000),
    ("samples", ".json.gz", b""),
    ("samples", ".jsonl.gz", _packed(lines_of(SAMPLES))[:30]),
    ("samples", ".json", b'[{"text": "a"}'),
    ("samples", ".jsonl", "ä".encode("utf-16")),
]
test_bytes, test_bytes_long = fuzzed(read_bytes, _BYTES, 80, 3000, FAILED_BYTES)


def _table(of: list[Any]) -> pyarrow.Table:
    return pyarrow.Table.from_pylist(of)


def _parquet(of: list[Any], **more: Any) -> bytes:
    held = io.BytesIO()
    pyarrow.parquet.write_table(_table(of), held, **more)
    return held.getvalue()


def _arrow(of: list[Any]) -> bytes:
    held = io.BytesIO()
    with pyarrow.ipc.new_stream(held, _table(of).schema) as stream:
        stream.write_table(_table(of))
    return held.getvalue()


_PLAIN = [SAMPLES[1]] * 3
_TABLES = {
    ".parquet": [_parquet(_PLAIN), _parquet(_PLAIN, compression="zstd", use_dictionary=False),
                 _parquet(SAMPLES[2:3] * 2, compression="none")],
    ".arrow": [_arrow(_PLAIN), _arrow(SAMPLES[2:3] * 2)],
}  # fmt: skip


def _odd(kind: pyarrow.DataType, value: Any) -> bytes:
    held = io.BytesIO()
    table = pyarrow.table(
        {"text": pyarrow.array(["a", "b"]), "x": pyarrow.array([value] * 2, kind)}
    )
    pyarrow.parquet.write_table(table, held)
    return held.getvalue()


def _not_utf8() -> bytes:
    held = io.BytesIO()
    wrong = pyarrow.array([b"\xff\xfe", b"ok"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": wrong}), held)
    return held.getvalue()


FAILED_TABLES: list[Any] = [
    ("samples", ".parquet", _not_utf8()),
    ("samples", ".parquet", _odd(pyarrow.timestamp("ms"), 2**60)),
    ("samples", ".parquet", _odd(pyarrow.date32(), 2**30)),
    ("samples", ".parquet", _odd(pyarrow.timestamp("ns", "Nowhere/None"), 5)),
    ("samples", ".parquet", b""),
]
test_table, test_table_long = fuzzed(
    read_bytes,
    st.sampled_from([*_TABLES]).flatmap(
        lambda end: st.tuples(st.just("samples"), st.just(end), damaged(_TABLES[end]))
    ),
    70, 2500, FAILED_TABLES,
)  # fmt: skip

# what may lie in a folder in place of a file
KINDS = {
    "file": lambda path: path.write_text('{"text": "a"}\n'),
    "empty": lambda path: path.write_bytes(b""),
    "folder": lambda path: path.mkdir(),
    "itself": lambda path: path.symlink_to(path),
    "parent": lambda path: path.symlink_to(path.parent),
    "nowhere": lambda path: path.symlink_to(path.parent / "nowhere"),
    "zeros": lambda path: path.symlink_to("/dev/zero"),
    "pipe": lambda path: os.mkfifo(path),
}
_STATE = {"_data_files": [{"filename": "a.jsonl"}], "_indices_data_files": None}
_SPLITS = {"splits": ["train", "test"]}
_ABOUT = st.one_of(
    st.none(), trees([_STATE, _SPLITS]).map(dumped), damaged([dumped(_STATE), dumped(_SPLITS)]),
    st.sampled_from(["pipe", "folder", "zeros"]),
)  # fmt: skip
_NAMES = st.sampled_from(
    ["a.jsonl", "b.json", "c.parquet", "d.arrow", "e.jsonl.gz", "f.txt", ".g.jsonl"]
)


def read_folder(case: tuple[dict[str, str], Any, Any]) -> None:
    """A folder of files that may be anything."""
    names, state, splits = case
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held, "data")
        folder.mkdir()
        for name, kind in names.items():
            KINDS[kind](folder / name)
        for name, about in (("state.json", state), ("dataset_dict.json", splits)):
            if isinstance(about, str):
                KINDS[about](folder / name)
            elif about is not None:
                (folder / name).write_bytes(about)

        def read() -> None:
            files.passed_over([str(folder)])
            for _, raw in (
                r for f in files.list_files([str(folder)]) for r in records.read_file(f)
            ):
                records.parse(raw)

        refused(read)


FAILED_FOLDERS: list[Any] = [
    ({"a.jsonl": kind}, dumped(_STATE), None) for kind in KINDS if kind != "file"
] + [
    ({"a.jsonl": "pipe"}, None, None),
    ({"a.jsonl": "file"}, dumped({"_data_files": [{"filename": "/dev/zero"}]}), None),
    ({"a.jsonl": "file"}, dumped({"_data_files": [{"filename": "../x.jsonl"}]}), None),
    ({"a.jsonl": "file"}, dumped({"_data_files": 5}), None),
    ({"a.jsonl": "file"}, dumped({"_data_files": [{}]}), None),
    ({"a.jsonl": "file"}, dumped({"_data_files": ["a"]}), None),
    ({"a.jsonl": "file"}, None, dumped({"splits": 5})),
    ({"a.jsonl": "file"}, b"[" * 100_000, None),
    ({"a.jsonl": "file"}, "pipe", None),
]
test_folder, test_folder_long = fuzzed(
    read_folder,
    st.tuples(st.dictionaries(_NAMES, st.sampled_from([*KINDS]), max_size=4), _ABOUT, _ABOUT),
    60, 1500, FAILED_FOLDERS,
)  # fmt: skip


@pytest.mark.parametrize("ending, name, said", [
    (".jsonl.gz", "_LINE", "a line of more than 999 bytes"),
    (".json.gz", "_ARRAY", "an array of more than 999 bytes"),
])  # fmt: skip
def test_a_packed_file_has_a_limit(
    ending: str, name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A megabyte of gzip holds a gigabyte: what is read at once is bounded."""
    monkeypatch.setattr(records, name, 999)
    path = tmp_path / f"a{ending}"
    path.write_bytes(_packed(b'[{"text": "' + b"a" * 5000 + b'"}]'))
    with pytest.raises(ValueError, match=said) as caught:
        samples(str(path))
    assert str(path) in str(caught.value)
