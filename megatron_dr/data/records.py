"""Input files as pieces of records: JSONL, Parquet, and Hugging Face datasets on disk."""

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".parquet", ".arrow")


@dataclass(frozen=True)
class Piece:
    """Consecutive records of a file, worked on as one.

    Attributes:
        file: number of the file in the input.
        first: number of its first line or row, from 1.
        count: lines or rows.
        offset: where it begins: a byte of JSONL, a row group of Parquet, unused for Arrow.
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


def list_files(paths: list[str]) -> list[str]:
    """The data files of files, folders (in order of names) and datasets on disk.

    Raises:
        ValueError: a path that is not there, of an unknown kind, or a folder without data.
    """
    files: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += _files_of_folder(path)
        elif not path.is_file():
            raise ValueError(f"{path}: no such file or folder.")
        elif path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: not data: name a file that ends in {', '.join(SUFFIXES)}.")
        else:
            files.append(str(path))
    twice = {file for file in files if files.count(file) > 1}
    if twice:
        raise ValueError(f"{min(twice)}: given twice: name it once.")
    return files


def _files_of_folder(folder: Path) -> list[str]:
    splits, state = folder / "dataset_dict.json", folder / "state.json"
    if splits.is_file():
        names = json.loads(splits.read_text(encoding="utf-8")).get("splits", [])
        raise ValueError(
            f"{folder}: a dataset of several splits: name one of "
            f"{', '.join(str(folder / name) for name in names)}."
        )
    if state.is_file():
        saved = json.loads(state.read_text(encoding="utf-8"))
        if saved.get("_indices_data_files") or saved.get("_indices_files"):
            raise ValueError(
                f"{folder}: a dataset that selects rows of its files: save it again with "
                "flatten_indices()."
            )
        return [str(folder / part["filename"]) for part in saved["_data_files"]]
    found = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES[:2] and p.is_file())
    if not found:
        raise ValueError(f"{folder}: no .jsonl or .parquet file in it, and no dataset on disk.")
    return [str(path) for path in found]


def inspect(number: int, path: str, piece_size: int) -> InputFile:
    """Hash a file and cut it in pieces of `piece_size` records (a Parquet file: in row groups).

    Raises:
        ValueError: a file that pyarrow can't read.
    """
    if path.endswith(".jsonl"):
        return _inspect_jsonl(number, path, piece_size)
    pieces = _table_pieces(number, path, piece_size)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return InputFile(path, digest, sum(piece.count for piece in pieces), tuple(pieces))


def _table_pieces(number: int, path: str, piece_size: int) -> list[Piece]:
    """Of Parquet its row groups, of Arrow so many rows."""
    table = _open(path)
    if path.endswith(".parquet"):
        metadata = table.metadata
        counts = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
    else:
        counts = [min(piece_size, len(table) - n) for n in range(0, len(table), piece_size)]
    firsts = itertools.accumulate(counts, initial=1)
    return [
        Piece(number, path, first, count, group)
        for group, (first, count) in enumerate(zip(firsts, counts, strict=False))
    ]


def _inspect_jsonl(number: int, path: str, piece_size: int) -> InputFile:
    digest, starts, offset, lines = hashlib.sha256(), [], 0, 0
    with open(path, "rb") as file:
        for raw in file:
            if lines % piece_size == 0:
                starts.append(offset)
            digest.update(raw)
            offset += len(raw)
            lines += 1
    pieces = [
        Piece(number, path, n * piece_size + 1, min(piece_size, lines - n * piece_size), start)
        for n, start in enumerate(starts)
    ]
    return InputFile(path, digest.hexdigest(), lines, tuple(pieces))


def read(piece: Piece) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
    """(line or row number from 1, the raw line or the row) of every record; empty lines left out.

    A row's null fields are left out: columns of Arrow have a place in every row.
    """
    if piece.path.endswith(".jsonl"):
        with open(piece.path, "rb") as file:
            file.seek(piece.offset)
            lines = enumerate(itertools.islice(file, piece.count), piece.first)
            yield from ((number, raw) for number, raw in lines if raw.strip())
        return
    table = _open(piece.path)
    if piece.path.endswith(".parquet"):
        batches = table.iter_batches(1024, row_groups=[piece.offset])
    else:
        batches = table.slice(piece.first - 1, piece.count).to_batches(1024)
    rows = (row for batch in batches for row in batch.to_pylist())
    yield from enumerate(map(_without_nulls, rows), piece.first)


def read_file(path: str) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
    """As `read`, of a whole file.

    Raises:
        ValueError: a file that pyarrow can't read.
    """
    pieces = [Piece(0, path, 1, sys.maxsize, 0)]
    if not path.endswith(".jsonl"):
        pieces = _table_pieces(0, path, 1 << 20)
    for piece in pieces:
        yield from read(piece)


def parse(raw: bytes | dict[str, Any]) -> dict[str, Any]:
    """The record of a row or of a line of JSONL; ValueError if it is none."""
    if isinstance(raw, dict):
        return raw
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason}).") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno}).") from None
    except (ValueError, RecursionError) as error:  # a huge number, deep nesting
        raise ValueError(f"JSON that can't be read ({error}).") from None
    if not isinstance(record, dict):
        raise ValueError(f"a line must be a JSON object, not {type(record).__name__}.")
    return record


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
    parquet = path.endswith(".parquet")
    try:
        if parquet:
            return pyarrow.parquet.ParquetFile(path)
        with pyarrow.memory_map(path) as source:
            return pyarrow.ipc.open_stream(source).read_all()
    except (pyarrow.ArrowInvalid, OSError) as error:
        kind = "a Parquet file" if parquet else "an Arrow stream"
        raise ValueError(f"{path}: not {kind} ({error}).") from None
