"""Metrics and records of a run, as report, watch and weights read them."""

import io
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st

from megatron_dr.cli import report_page, watch
from megatron_dr.compare.jobs import job
from megatron_dr.report import charts, record, run_log

from ._cases import Raw, bounded, command, damaged, dumped, fuzzed, trees

_RUN = {"kind": "run", "iteration": 0, "run": {
    "program": "train.py", "flags": [["--lr", "1e-3"], ["--dr-set", "cone"]], "folder": "/x",
    "started": "2026-01-01T00:00:00+00:00", "versions": {"torch": "2"}, "steps": 3,
    "git": {"commit": "abc", "changed": True}, "process": {"host": "h", "pid": 1, "created": 1.0},
    "machine": {"processor": "x", "system": "Linux", "cores": 2, "memory bytes": 10},
    "blocks": ["decoder.layers.0", "embedding"], "layout": {"tp": 1}, "device": "cpu", "ranks": 2,
    "projection": {"set": "cone"}, "record": "record",
}}  # fmt: skip
_STEP = {"kind": "train", "iteration": 1, "lm loss": 2.5, "dr cos update": 0.5, "dr alpha": 0.1,
         "step seconds": 0.2, "dr weight a": 1.0, "dr rows": 4.0, "grad norm": 1.0}  # fmt: skip
_LINES = [
    _RUN, _STEP, _STEP | {"iteration": 2, "lm loss": float("nan")},
    {"kind": "blocks", "iteration": 2, "weight": [0.5, 1.5], "cos update": [0.1, 0.2]},
    {"kind": "validation", "iteration": 2, "lm loss": 2.0},
    {"kind": "validation-target", "iteration": 2, "lm loss": 2.0, "validation seconds": 1.0},
    {"kind": "test", "iteration": 2, "lm loss": 1.0}, {"kind": "end", "iteration": 2},
]  # fmt: skip


# pictures take a second a page; `commands` draws them
_DRAWN = {name: mock.Mock(return_value="") for name in ("lines", "areas", "bars", "heat_map")}


def show(case: list[Any] | bytes) -> None:
    """A page and a frame are made of what can be read; the rest is passed over."""
    with tempfile.TemporaryDirectory() as held:
        path = Path(held, "metrics.jsonl")
        lines = case if isinstance(case, bytes) else b"\n".join(map(dumped, case))
        path.write_bytes(lines)
        with bounded():
            try:
                found = run_log.read_all([Path(held)])
            except (ValueError, OSError) as error:
                assert str(path) in str(error)
                return
            with mock.patch.multiple(charts, **_DRAWN):
                report_page.text(found)
            watch.frame(found[0], 80)
            for line in (line for of in found[0].kinds.values() for line in of):
                watch.line_of(line, found[0])


_CASES = trees([_LINES]).map(lambda tree: tree if isinstance(tree, list) else [tree]) | damaged(
    [b"\n".join(map(dumped, _LINES))]
)
FAILED: list[Any] = [
    [_RUN, Raw("[" * 5000)], [_RUN, _STEP | {"lm loss": Raw("1" * 400)}],
    [_RUN, _STEP | {"iteration": Raw("1" * 400)}], b"\xff\xfe", b"",
    [_RUN | {"run": {"blocks": 5, "steps": "x", "git": 3, "flags": 5, "process": [], "record": 5}}],
    [_RUN | {"run": {"process": {"pid": 2**40, "created": "x"}, "machine": {"memory bytes": "x"}}}],
    [_RUN, {"kind": "blocks", "iteration": 1, "weight": ["a", None]}],
]  # fmt: skip
test_show, test_show_long = fuzzed(show, _CASES, 20, 800, FAILED)


def commands(case: list[Any] | bytes) -> None:
    with tempfile.TemporaryDirectory() as held:
        path = Path(held, "run", "metrics.jsonl")
        path.parent.mkdir()
        path.write_bytes(case if isinstance(case, bytes) else b"\n".join(map(dumped, case)))
        command(["watch", str(path.parent), "--once"], Path(held))
        command(["report", str(path), "--out", str(Path(held, "out.html"))], Path(held))


test_commands, test_commands_long = fuzzed(commands, _CASES, 1, 40)

_ROW = {"step": 1, "block": "decoder.layers.0.mlp", "row": 0, "kind": "sample", "weight": 0.5,
        "score": 0.1, "corpus": "a", "file": "a.jsonl", "line": 1, "id": "1",
        "hash": "text:00"}  # fmt: skip
_ROWS = [_ROW, _ROW | {"row": 1, "weight": 1.5, "line": 2}, _ROW | {"block": "embedding"},
         _ROW | {"kind": "slot", "id": '["1", "2"]', "hash": '["text:00", "text:01"]'}]  # fmt: skip


def parquet(rows: list[Any], note: bytes = b"{}") -> bytes:
    held = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows, record.SCHEMA)
    pyarrow.parquet.write_table(table.replace_schema_metadata({b"megatron_dr": note}), held)
    return held.getvalue()


def weights(case: bytes) -> None:
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held, "record")
        folder.mkdir()
        (folder / "a.parquet").write_bytes(case)
        Path(held, "a.jsonl").write_text('{"text": "a"}\n')
        more = [[], ["--blend"], ["--layers"], ["--csv", str(Path(held, "w.csv"))],
                ["--filter", str(Path(held, "a.jsonl")), str(Path(held, "b.jsonl")),
                 "--keep-above", "0.5"]]  # fmt: skip
        for flags in more:
            command(["weights", str(folder), *flags], Path(held))
            for path in Path(held).glob("*.csv"):
                path.unlink()


_VALUES = st.fixed_dictionaries({}, optional={
    "weight": st.sampled_from([float("nan"), float("inf"), 0.0, -1.0, 1e308]),
    "score": st.none(), "corpus": st.none() | st.text(max_size=3), "line": st.none() | st.just(0),
    "file": st.sampled_from([None, "", "/dev/zero", "\0", "a.jsonl", "x" * 5000]),
    "id": st.sampled_from([None, "", "[", "5", "[1]", "[" * 5000]),
    "hash": st.sampled_from([None, "", "tokens:", "[", "5", "[1]", '["a", "b"]']),
    "kind": st.sampled_from(["slot", "rank", "domain", "x", ""]), "block": st.text(max_size=9),
    "step": st.sampled_from([0, -1, 2**62]),
})  # fmt: skip
_TABLES = st.one_of(
    damaged([parquet(_ROWS), parquet(_ROWS[:2])]),
    st.lists(st.tuples(st.sampled_from(_ROWS), _VALUES), max_size=4)
    .map(lambda rows: parquet([row | more for row, more in rows])),
    st.one_of(trees([{"left_out": 1, "files": {"a": "b"}}]).map(dumped), st.binary(max_size=5))
    .map(lambda note: parquet(_ROWS[:2], note)),
)  # fmt: skip
FAILED_TABLES = [
    parquet([_ROW | {"kind": "slot", "id": "[" * 5000, "hash": "[]"}]),
    parquet([_ROW | {"kind": "slot", "id": "5", "hash": "5"}]), parquet([]),
    parquet(_ROWS, b"["), parquet(_ROWS, b"5"), parquet(_ROWS, b'{"left_out": "a"}'),
    parquet(_ROWS, b'{"files": 5}'),
]  # fmt: skip
test_weights, test_weights_long = fuzzed(weights, _TABLES, 6, 200, FAILED_TABLES)


def done(case: bytes) -> None:
    """What a comparison's run left of itself: damaged, it is run again."""
    with tempfile.TemporaryDirectory() as held:
        Path(held, "done").write_bytes(case)
        made = job("mix", 1, 2, Path(held), "--a 1")
        with bounded():
            assert isinstance(made.done, dict) and not made.is_finished


_DONE = dumped({"fingerprint": "0", "seconds": 1.0, "memory": 5})
test_done, test_done_long = fuzzed(
    done, damaged([_DONE]) | trees([json.loads(_DONE)]).map(dumped), 20, 300,
    [b"{", b"[]", b"", b"\xff{", b'{"a":' * 5000],
)  # fmt: skip
