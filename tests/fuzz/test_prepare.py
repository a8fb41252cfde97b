"""`megatron-dr prepare`: its flags, bad data, and what an earlier run left damaged."""

import functools
import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import strategies as st

from megatron_dr.data import prepare as room

from ._cases import TEXTS, command, damaged, dumped, fuzzed, trees
from .test_records import SAMPLES, lines_of

_DATA = SAMPLES[:2] * 3
_SHARD = "out.partial/shard-000000.npz"


def prepare(folder: Path, *flags: str) -> tuple[int, str]:
    words = ["prepare", str(folder / "a.jsonl"), "--output", str(folder / "out")]
    words += ["--tokenizer", "byte-level", "--workers", "1", "--shard-size", "2", *flags]
    return command(words, folder)


def run(case: tuple[bytes, list[str]]) -> None:
    content, flags = case
    with tempfile.TemporaryDirectory() as held:
        Path(held, "a.jsonl").write_bytes(content)
        code, said = prepare(Path(held), *flags)
        if not code:
            manifest = json.loads(Path(held, "out.json").read_text())
            assert manifest["statistics"]["tokens"]["samples"] >= 0, said


_FLAGS = st.lists(
    st.tuples(
        st.sampled_from(["--max-length", "--validation", "--seed", "--shard-size", "--columns",
                         "--form", "--too-long", "--bad-lines", "--chat-template", "--thoughts",
                         "--tokenizer"]),
        TEXTS.filter(lambda text: "\0" not in text)
        | st.sampled_from(["0", "2", "3", "1e-9", "0.5", "99999999999999999999", "nan", "inf",
                           "skip", "cut", "drop", "refuse", "text=prompt", "prompts", "all"]),
    ),
    max_size=2,
).map(lambda pairs: [f"{flag}={value}" for flag, value in pairs])  # fmt: skip
_GOOD = lines_of(_DATA)
FAILED: list[Any] = [
    (_GOOD, ["--validation=nan"]), (_GOOD, ["--validation=inf"]), (_GOOD, ["--validation=-1"]),
    (_GOOD, ["--validation=99999999999999999999"]), 
    (_GOOD, ["--seed=99999999999999999999", "--validation=2"]),
    (_GOOD, ["--seed=-1", "--validation=2"]), (_GOOD, ["--tokenizer=\ud83d"]),
    (_GOOD, ["--chat-template=" + "x" * 9999]), (b"", []),
]  # fmt: skip
test_run, test_run_long = fuzzed(
    run, st.tuples(damaged([_GOOD]) | st.just(_GOOD), _FLAGS), 12, 600, FAILED
)


def begun(folder: Path, which: str) -> None:
    """A run that has ended, or that was cut off when all shards were there."""
    (folder / "a.jsonl").write_bytes(_GOOD)
    stop = mock.Mock(side_effect=ValueError("cut off"))
    with mock.patch.object(room, "_merge", stop) if which == "partial" else nullcontext():
        assert prepare(folder)[0] == (which == "partial")


@functools.cache
def shard() -> bytes:
    with tempfile.TemporaryDirectory() as held:
        begun(Path(held), "partial")
        return Path(held, _SHARD).read_bytes()


def go_on(case: tuple[str, str, bytes]) -> None:
    """A file of what is there is damaged: refused by its name, or the run goes on."""
    which, name, change = case
    with tempfile.TemporaryDirectory() as held:
        begun(Path(held), which)
        path = Path(held, name)
        assert path.is_file()
        path.write_bytes(change)
        code, said = prepare(Path(held))
        assert not code or name in said, said


_PLAN = {"format": 2, "form": "sft", "files": [{"path": "a", "sha256": "b", "records": 1}]}
_PLANS = trees([_PLAN]).map(dumped) | st.binary(max_size=9)
_CASES = st.one_of(
    st.tuples(st.just("partial"), st.just("out.partial/plan.json"), _PLANS),
    st.tuples(st.just("partial"), st.just(_SHARD), st.deferred(lambda: damaged([shard()]))),
    st.tuples(st.just("whole"), st.just("out.json"), _PLANS),
)
FAILED_LEFT: list[Any] = [
    ("partial", _SHARD, b""), ("partial", _SHARD, b"PK\x03\x04"), ("partial", _SHARD, b"\x93NUMPY"),
    ("partial", "out.partial/plan.json", b"[]"), ("partial", "out.partial/plan.json", b""),
    ("whole", "out.json", b"5"), ("whole", "out.json", b"[" * 100_000), ("whole", "out.json", b""),
]  # fmt: skip
test_left, test_left_long = fuzzed(go_on, _CASES, 15, 300, FAILED_LEFT)
