"""Input files as pieces of records: lines and arrays of JSON, Parquet, and Arrow streams."""

import gzip
import hashlib
import itertools
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron_dr.data.files import ending, is_gzip, kind

_GZIP_PIECES = 64  # at most: each is read from the file's beginning
_PART = 1 << 24
_LINE, _ARRAY = 1 << 28, 1 << 32  # bytes of a line, and of an array, at most


@dataclass(frozen=True)
class Piece:
    """Consecutive records of a file, worked on as one.

    Attributes:
        file: number of the file in the input.
        first: number of its first line, row or element, from 1.
        count: lines, rows or elements.
        offset: where it begins: a byte of JSONL (as it is unpacked), a row group of Parquet,
            unused for others.
    """

    file: int
    path: str
    first: int
    count: int
    offset: int


@dataclass(frozen=True)
class InputFile:
    """A file of the input and what it holds; `sha256` is of its bytes."""

    path: str
    sha256: str
    records: int
    pieces: tuple[Piece, ...]


def inspect(number: int, path: str, piece_size: int) -> InputFile:
    """Hash a file and cut it in pieces of `piece_size` records.

    A Parquet file is cut in its row groups, an array not at all, and a gzip file in 64 pieces at
    most.

    Raises:
        ValueError: a file that can't be read.
    """
    pieces = _pieces(number, path, piece_size)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return InputFile(path, digest, sum(piece.count for piece in pieces), tuple(pieces))


def _pieces(number: int, path: str, piece_size: int) -> list[Piece]:
    if is_array(path):
        return [Piece(number, path, 1, len(_array(path)), 0)]
    return (_line_pieces if kind(path) == "json" else _table_pieces)(number, path, piece_size)


def _table_pieces(number: int, path: str, piece_size: int) -> list[Piece]:
    """Of Parquet its row groups, of Arrow so many rows."""
    table = _open(path)
    if kind(path) == "parquet":
        metadata = table.metadata
        counts = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
    else:
        counts = [min(piece_size, len(table) - n) for n in range(0, len(table), piece_size)]
    firsts = itertools.accumulate(counts, initial=1)
    return [
        Piece(number, path, first, count, group)
        for group, (first, count) in enumerate(zip(firsts, counts, strict=False))
    ]


def _line_pieces(number: int, path: str, piece_size: int) -> list[Piece]:
    starts, offset, lines = [], 0, 0
    with _lines(path) as file:
        for raw in _each(file, path):
            if lines % piece_size == 0:
                starts.append(offset)
            offset += len(raw)
            lines += 1
    if is_gzip(path):
        joined = -(-len(starts) // _GZIP_PIECES) or 1
        starts, piece_size = starts[::joined], piece_size * joined
    return [
        Piece(number, path, n * piece_size + 1, min(piece_size, lines - n * piece_size), start)
        for n, start in enumerate(starts)
    ]


@contextmanager
def _lines(path: str) -> Iterator[Any]:
    """A file of lines, unpacked as it is read."""
    try:
        with gzip.open(path) if is_gzip(path) else open(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}).") from None


def _each(file: Any, path: str) -> Iterator[bytes]:
    """Its lines. A packed file of some MB may hold one that fills all memory."""
    while raw := file.readline(_LINE + 1):
        if len(raw) > _LINE:
            raise ValueError(f"{path}: it has a line of more than {_LINE:,} bytes, no record.")
        yield raw


def is_array(path: str) -> bool:
    """Whether a file is one JSON array of records; one that ends in .jsonl never is."""
    if not ending(path).startswith(".json") or ending(path).startswith(".jsonl"):
        return False
    with _lines(path) as file:
        beginning: bytes = file.read(4096)
        return beginning.lstrip().startswith(b"[")


def _array(path: str) -> list[Any]:
    parts, size = list[bytes](), 0
    with _lines(path) as file:
        while part := file.read(_PART):
            parts.append(part)
            size += len(part)
            if size > _ARRAY:
                raise ValueError(
                    f"{path}: an array of more than {_ARRAY:,} bytes: make lines of it."
                )
    found = _loaded(b"".join(parts), path)
    assert isinstance(found, list)
    return found


def read(piece: Piece) -> Iterator[tuple[int, Any]]:
    """(number from 1, the raw line in bytes, the row or the element) of every record.

    Empty lines are left out.

    A row's null fields are left out: columns of Arrow have a place in every row.
    """
    if is_array(piece.path):
        yield from enumerate(_array(piece.path), piece.first)
        return
    if kind(piece.path) == "json":
        with _lines(piece.path) as file:
            file.seek(piece.offset)
            each = _each(file, piece.path)
            lines = enumerate(itertools.islice(each, piece.count), piece.first)
            yield from ((number, raw) for number, raw in lines if raw.strip())
        return
    yield from enumerate(map(_without_nulls, _rows(piece)), piece.first)


def _rows(piece: Piece) -> Iterator[dict[str, Any]]:
    """The rows of a piece of a table.

    Raises:
        ValueError: it is damaged, or has a value that Python can't hold.
    """
    table = _open(piece.path)
    from pyarrow import ArrowException

    try:
        if kind(piece.path) == "parquet":
            batches = table.iter_batches(1024, row_groups=[piece.offset])
        else:
            batches = table.slice(piece.first - 1, piece.count).to_batches(1024)
        for batch in batches:
            batch.validate(full=True)  # offsets that lie would be followed
            yield from batch.to_pylist()
    except (ArrowException, OSError, ValueError, OverflowError, LookupError) as error:
        raise ValueError(f"{piece.path}: damaged, or not to be read ({_first(error)}).") from None


def read_file(path: str) -> Iterator[tuple[int, Any]]:
    """As `read`, of a whole file.

    Raises:
        ValueError: a file that can't be read.
    """
    pieces = [Piece(0, path, 1, sys.maxsize, 0)]
    if kind(path) != "json":
        pieces = _table_pieces(0, path, 1 << 20)
    for piece in pieces:
        yield from read(piece)


def parse(raw: Any) -> dict[str, Any]:
    """The record of what `read` gives; ValueError if it is none."""
    record = _loaded(raw) if isinstance(raw, bytes) else raw
    if not isinstance(record, dict):
        raise ValueError(f"a record must be a JSON object, not {type(record).__name__}.")
    return record


def _loaded(raw: bytes, path: str = "") -> Any:
    """What a line of JSON says, or a whole file with this path."""
    whose = f"{path}: " if path else ""
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{whose}not UTF-8 ({error.reason}).") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if path else ""
        raise ValueError(f"{whose}not JSON ({error.msg}, {line}column {error.colno}).") from None
    except (ValueError, RecursionError) as error:  # a huge number, deep nesting
        raise ValueError(f"{whose}JSON that can't be read ({error}).") from None


@contextmanager
def at(where: str) -> Iterator[None]:
    """Let the sentence of a ValueError begin with the place of the record."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


def _open(path: str) -> Any:
    """A Parquet file, or the table of an Arrow stream, mapped into memory."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path} needs pyarrow: pip install 'megatron_dr[data]'.") from None
    parquet = kind(path) == "parquet"
    try:
        if parquet:
            return pyarrow.parquet.ParquetFile(path)
        with pyarrow.memory_map(path) as source:
            table = pyarrow.ipc.open_stream(source).read_all()
            table.validate()
            return table
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        what = "a Parquet file" if parquet else "an Arrow stream"
        raise ValueError(f"{path}: not {what} ({_first(error)}).") from None


def _first(error: Exception) -> str:
    """A library's error in a line."""
    return f"{error}".strip().partition("\n")[0][:300] or type(error).__name__
