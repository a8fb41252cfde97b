"""Indexed datasets whose index lies: what is accepted can be read to its end."""

import struct
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from megatron_dr.data import indexed

from ._cases import damaged, fuzzed, refused

_KINDS = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def index(
    lengths: list[int], places: list[int], documents: list[int], kind: int = 8, version: int = 1,
    counts: tuple[int, int] | None = None,
) -> bytes:  # fmt: skip
    """As Megatron writes it."""
    head = b"MMIDIDX\0\0" + struct.pack("<QB", version, kind)
    counted = struct.pack("<QQ", *(counts or (len(lengths), len(documents))))
    arrays = ((lengths, "<i4"), (places, "<i8"), (documents, "<i8"))
    return head + counted + b"".join(np.array(a).astype(t).tobytes() for a, t in arrays)


GOOD = index([3, 2, 4], [0, 6, 10], [0, 1, 2, 3])
DATA = np.arange(9, dtype="<u2").tobytes()


def read(case: tuple[bytes, bytes]) -> None:
    with tempfile.TemporaryDirectory() as held:
        prefix = str(Path(held, "a"))
        for end, content in zip((".idx", ".bin"), case, strict=True):
            Path(prefix + end).write_bytes(content)
        if refused(lambda: indexed.check(prefix), prefix):
            return
        kind, sequences, documents = struct.unpack("<BQQ", case[0][17:34])
        lengths = np.frombuffer(case[0], "<i4", sequences, 34)
        places = np.frombuffer(case[0], "<i8", sequences, 34 + 4 * sequences)
        ends = np.frombuffer(case[0], "<i8", documents, 34 + 12 * sequences)
        for length, place in zip(lengths, places, strict=True):
            found = np.frombuffer(case[1] + b"\0", _KINDS[kind], length, place)
            assert len(found) == length
        assert not sequences or (ends[0] == 0 and ends[-1] == sequences)


_NUMBERS = st.sampled_from([0, 1, -1, 3, 2**31 - 1, 2**40, 2**62, 2**63 - 1, -(2**63)])
_SHORT = st.sampled_from([0, 1, -1, 3, 2**31 - 1, -(2**31)])
_LYING = st.builds(
    index, st.lists(_SHORT | st.just(2), max_size=3), st.lists(_NUMBERS, max_size=3),
    st.lists(_NUMBERS, max_size=4), st.integers(0, 255), st.sampled_from([1, 0, 2**63]),
    st.none() | st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
)  # fmt: skip
FAILED = [
    (index([3], [0], [0, 1], counts=(2**63, 2)), DATA), (index([3], [2**63 - 1], [0, 1]), DATA),
    (index([-5], [0], [0, 1]), DATA), (index([3], [0], [0, 7]), DATA), (GOOD, b""), (b"", DATA),
    (index([3], [0], [0, 1], kind=6), DATA), (index([3], [0], [1]), DATA), (GOOD, DATA[:-1]),
    (index([], [], []), DATA), (index([], [], [0]), b""),
]  # fmt: skip
test_read, test_read_long = fuzzed(
    read,
    st.tuples(damaged([GOOD]) | _LYING, st.just(DATA)) | st.tuples(st.just(GOOD), damaged([DATA])),
    100, 2000, FAILED,
)  # fmt: skip
