"""The form of Megatron's indexed datasets, looked at before they are read.

PREFIX.idx has, little-endian: 9 bytes of a name, the version (uint64), the tokens' type (uint8),
the numbers of sequences N and of document boundaries D (uint64), N lengths [tokens] (int32), N
places in PREFIX.bin [bytes] (int64), D boundaries [sequences] (int64); multimodal ones N modes.
"""

import os
import struct
from collections.abc import Iterator

import numpy as np

_NAME, _VERSION = b"MMIDIDX\x00\x00", 1
_HEADER = struct.Struct("<9sQBQQ")
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # bytes, by type; 6 and 7 are no integers
_CHUNK = 1 << 22


def check(prefix: str) -> None:
    """That the index has its form, and that the data has all that it names.

    Raises:
        ValueError: the first thing that is wrong, with its file.
    """
    path = f"{prefix}.idx"
    try:
        with open(path, "rb") as file:
            head = file.read(_HEADER.size)
        size, data = os.path.getsize(path), os.path.getsize(f"{prefix}.bin")
    except OSError as error:
        raise ValueError(f"{error.filename}: can't be read ({error.strerror}).") from None
    if len(head) < _HEADER.size or not head.startswith(_NAME):
        raise ValueError(f"{path}: no index of an indexed dataset, or cut short.")
    _, version, kind, sequences, documents = _HEADER.unpack(head)
    if version != _VERSION or kind not in _SIZES:
        raise ValueError(
            f"{path}: damaged: it has version {version}, where {_VERSION} is known, and tokens of "
            f"type {kind}, where integers are {', '.join(map(str, _SIZES))}."
        )
    if size < _HEADER.size + 12 * sequences + 8 * documents:
        raise ValueError(
            f"{path}: cut short, or damaged: {size} bytes, too few for the {sequences} sequences "
            f"and {documents} boundaries of documents that it says."
        )
    starts = _HEADER.size + np.array([0, 4, 12]) * sequences
    _check_places(prefix, int(sequences), starts.tolist(), _SIZES[kind], data)
    _check_documents(path, int(sequences), int(documents), int(starts[2]))


def _parts(path: str, dtype: str, count: int, start: int) -> Iterator[np.ndarray]:
    with open(path, "rb") as file:
        file.seek(start)
        for first in range(0, count, _CHUNK):
            yield np.fromfile(file, dtype, min(_CHUNK, count - first))


def _check_places(prefix: str, sequences: int, starts: list[int], size: int, data: int) -> None:
    path, first = f"{prefix}.idx", 0
    both = (_parts(path, "<i4", sequences, starts[0]), _parts(path, "<i8", sequences, starts[1]))
    for length_N, place_N in zip(*both, strict=True):
        # no sum, which may be larger than int64
        wrong_N = (
            (length_N < 0) | (place_N < 0) | (place_N > data - length_N.astype(np.int64) * size)
        )
        if wrong_N.any():
            n = int(wrong_N.argmax())
            raise ValueError(
                f"{prefix}.bin: cut short, or its index damaged: sequence {first + n} is to have "
                f"{length_N[n]} tokens from byte {place_N[n]} on, of {data} bytes."
            )
        first += len(length_N)


def _check_documents(path: str, sequences: int, documents: int, start: int) -> None:
    last = 0
    for number, end_D in enumerate(_parts(path, "<i8", documents, start)):
        ends = np.concatenate([[0 if not number else last], end_D])
        if (np.diff(ends) < 0).any() or (not number and end_D[0] != 0):
            raise ValueError(f"{path}: damaged: its documents don't follow one another.")
        last = int(ends[-1])
    if documents and last != sequences or not documents and sequences:
        raise ValueError(
            f"{path}: damaged: its documents end with sequence {last}, but there are {sequences}."
        )
