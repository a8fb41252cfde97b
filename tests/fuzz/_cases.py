"""What bad input is made of, and what is asked of who reads it.

A reader gives a value, or raises one of the errors that commands turn into one sentence, within
`SECONDS` of a processor, `WAITED` by the clock and `MEMORY` bytes; a command prints no traceback
and leaves nothing half written.
"""

import copy
import json
import logging
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

SECONDS, MEMORY = 10, 2 << 30
WAITED = 60  # seconds by the clock: what waits for another uses no processor
COUNTS: Counter[str] = Counter()  # cases of each test; conftest.py says them
HALF = "\ud83d"


class Slow(BaseException):
    """More than `SECONDS` or `WAITED`: no reader catches it."""


def fuzzed(
    check: Callable[[Any], None], cases: st.SearchStrategy[Any], short: int, long: int,
    failed: Sequence[Any] = (),
) -> tuple[Callable[[], None], Callable[[], None]]:  # fmt: skip
    """A test of `short` cases, the same each time, and one of `long` that `make soak` runs.

    Args:
        failed: cases that once failed, tried every time.
    """
    name = f"{check.__module__.rpartition('.')[2]}.{check.__name__}"

    def counted(case: Any) -> None:
        COUNTS[name] += 1
        check(case)

    def test(most: int, same: bool) -> Any:
        made = given(cases)(counted)
        for case in failed:
            made = example(case)(made)
        return settings(
            max_examples=most, derandomize=same, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        )(made)  # fmt: skip

    return test(short, True), pytest.mark.soak(pytest.mark.timeout(900)(test(long, False)))


@contextmanager
def bounded() -> Iterator[None]:
    """Within the limits of time and memory."""

    def late(*_: Any) -> None:
        raise Slow

    clocks = {
        signal.ITIMER_VIRTUAL: (signal.SIGVTALRM, SECONDS),
        signal.ITIMER_REAL: (signal.SIGALRM, WAITED),
    }
    before = {kind: signal.signal(kind, late) for kind, _ in clocks.values()}
    rest = signal.getitimer(signal.ITIMER_REAL)  # pytest-timeout's
    began = time.monotonic()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        for clock, (_, seconds) in clocks.items():
            signal.setitimer(clock, seconds)
        yield
    finally:
        for clock in clocks:
            signal.setitimer(clock, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for kind, handler in before.items():
            signal.signal(kind, handler)
        if rest[0]:
            left = rest[0] - (time.monotonic() - began)
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3), rest[1])


def refused(read: Callable[[], Any], *names: Any, errors: tuple[type[Exception], ...] = ()) -> bool:
    """Whether reading is refused, in one sentence with these names."""
    with bounded():
        try:
            read()
        except (ValueError, OSError, *errors) as error:
            said = str(error)
        else:
            return False
    assert said.strip() and "\n" not in said, said
    for name in names:
        assert str(name) in said, said
    return True


def command(argv: Sequence[str], folder: Path) -> tuple[int, str]:
    """Exit code of `megatron-dr`, and what it said; nothing of a refusal is left in the folder."""
    from megatron_dr.cli.main import main

    def held() -> set[Path]:
        return {path for path in folder.rglob("*") if ".partial" not in str(path)}

    before, out, code = held(), StringIO(), 0
    with redirect_stdout(out), redirect_stderr(out), warnings.catch_warnings(), bounded():
        try:
            code = main(argv)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
            print(error.code if isinstance(error.code, str) else "", file=sys.stderr)
        finally:
            logging.disable(logging.NOTSET)
    said = out.getvalue()
    assert "Traceback" not in said, said
    if code:
        assert said.strip(), argv
        assert held() == before, (held() - before, said)
    return code, said


NUMBERS = st.sampled_from([
    0, -1, 1, 2, 7, 2**31, 2**63 - 1, 2**63, -(2**63), 2**64, 10**400, 0.5, -0.0, 1e308, 1e-320,
    float("nan"), float("inf"), float("-inf"),
])  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from(["", " ", "a", "\0", HALF, "x" * 9999, "../a", "/dev/zero", "1e5", "nan",
                     "é\u202e", "{{ 9 ** 9 }}", "%s%n", "a\r\nb", "\ufeff", "-1", "NaN", "null"]),
    st.text(max_size=8),
)  # fmt: skip
DEEP = st.integers(1, 3000).map(lambda depth: Raw("[" * depth + "]" * depth))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


class Raw:
    """JSON that is written as it is, such as deep nesting."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"Raw({self.text[:20]!r}... {len(self.text)})"


def dumped(tree: Any) -> bytes:
    """JSON with `Raw` in it; keys that are there twice are written twice."""
    raw: list[str] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Raw):
            raw.append(value.text)
            return f"@raw{len(raw) - 1}@"
        if isinstance(value, dict):
            return {key: plain(held) for key, held in value.items()}
        return [plain(held) for held in value] if isinstance(value, list) else value

    text = json.dumps(plain(tree))
    for number, written in enumerate(raw):
        text = text.replace(f'"@raw{number}@"', written)
    return text.encode()


def _places(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _places(value, (*place, key))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from _places(value, (*place, number))


def _changed(tree: Any, place: tuple[Any, ...], how: str, value: Any) -> Any:
    if not place:
        return value if how == "put" else tree
    tree = copy.copy(tree)
    if len(place) > 1:
        tree[place[0]] = _changed(tree[place[0]], place[1:], how, value)
    elif how == "put":
        tree[place[0]] = value
    elif how == "drop":
        del tree[place[0]]
    elif isinstance(tree, list):  # another one
        tree.insert(place[0], value)
    elif isinstance(value, str):  # another name
        tree[value] = tree[place[0]]
    return tree


@st.composite
def trees(draw: Any, bases: Sequence[Any], values: st.SearchStrategy[Any] | None = None) -> Any:
    """One of the values of JSON with one to three changes."""
    tree = draw(st.sampled_from(bases))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        place = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["put", "put", "put", "drop", "more"]))
        tree = _changed(tree, place, how, draw(VALUES | DEEP if values is None else values))
    return tree


_INTS = [
    n.to_bytes(8, "little", signed=n < 0)
    for n in (0, 1, -1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63))
]
_BITS = [
    b"\0" * 8,
    b"\xff" * 8,
    b"\r\n",
    b"\xef\xbb\xbf",
    b"\xed\xa0\xbd",
    b"[" * 2000,
    b"{",
    b'"',
    b".",
]


@st.composite
def damaged(draw: Any, bases: Sequence[bytes]) -> bytes:
    """One of the files with one to four changes: cut, flipped, overwritten, longer, doubled."""
    found = bytearray(draw(st.sampled_from(bases)))
    for _ in range(draw(st.integers(1, 4))):
        size = len(found)
        # near the beginning or the end, where headers are, or anywhere
        place = draw(st.one_of(
            st.integers(0, min(size, 64)), st.integers(max(size - 200, 0), size),
            st.integers(0, size),
        ))  # fmt: skip
        how = draw(
            st.sampled_from(["cut", "flip", "flip", "flip", "over", "over", "in", "out", "twice"])
        )
        if how == "cut":
            del found[place:]
        elif how == "flip" and place < size:
            found[place] ^= draw(st.integers(1, 255))
        elif how == "over":
            new = draw(st.sampled_from(_INTS + _BITS))
            found[place : place + len(new)] = new
        elif how == "in":
            found[place:place] = draw(st.sampled_from(_INTS + _BITS) | st.binary(max_size=9))
        elif how == "out":
            del found[place : place + draw(st.integers(1, 64))]
        elif how == "twice":
            found[place:place] = found[place : place + draw(st.integers(1, 200))]
    return bytes(found)
