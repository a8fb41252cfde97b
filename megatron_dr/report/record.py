"""A record of what was chosen: Parquet files, one row per (step, block, row); `--dr-record FOLDER`.

| column | |
|---|---|
| `step` | iteration of the run, from 1 |
| `block` | parameters that were projected together |
| `row` | of a sample its place in the step's global batch, of other rows their number |
| `kind` | sample, slot, rank or domain |
| `weight` | share in the direction: 1 is what the row has in the plain mean |
| `score` | cosine of the row with the target; null where products of rows were not needed |
| `corpus` | the path of a sample's data, the name of a domain |
| `file`, `line` | where the sample is from; `line` is a row's number, too, from 1 |
| `id` | its record's own, or its number in an indexed dataset |
| `hash` | of its content, `text:...` of a record, `tokens:...` of an indexed sample |

A slot or rank of several samples has in `id` and `hash` lists of them, as JSON, and in `corpus` and
`file` what they have in common. A file is there whole or not at all.
"""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from megatron_dr.report import metrics

SCHEMA = pyarrow.schema(
    [
        pyarrow.field("step", pyarrow.int64(), nullable=False),
        pyarrow.field("block", pyarrow.string(), nullable=False),
        pyarrow.field("row", pyarrow.int32(), nullable=False),
        pyarrow.field("kind", pyarrow.string(), nullable=False),
        pyarrow.field("weight", pyarrow.float64(), nullable=False),
        pyarrow.field("score", pyarrow.float64()),
        pyarrow.field("corpus", pyarrow.string()),
        pyarrow.field("file", pyarrow.string()),
        pyarrow.field("line", pyarrow.int64()),
        pyarrow.field("id", pyarrow.string()),
        pyarrow.field("hash", pyarrow.string()),
    ]
)  # fmt: skip
LISTED = ("slot", "rank")  # kinds whose id and hash are lists
_STEPS, _ROWS = 64, 1 << 17  # of a file, about
_KEY = b"megatron_dr"
_Errors = (OSError, pyarrow.ArrowException)


def about(table: pyarrow.Table) -> dict[str, Any]:
    """What is known of the record as a whole.

    Returns:
        'left_out': rows that were beyond the most and least of --dr-record-rows; 'files': sha256
        of files that an indexed dataset was prepared from.
    """
    found: Any = json.loads((table.schema.metadata or {}).get(_KEY, b"{}"))
    note: dict[str, Any] = {"left_out": 0, "files": {}} | found
    if not isinstance(note["left_out"], int) or not isinstance(note["files"], dict):
        raise TypeError("it notes no number and no files")
    return note


def read(folder: str | Path) -> pyarrow.Table:
    """All rows of a record, by step.

    Raises:
        ValueError: the folder has no record, or a file that is none.
    """
    paths = files(folder)
    if not paths:
        raise ValueError(
            f"{folder}: no record is there (no .parquet files): name the folder that --dr-record "
            "of a run wrote."
        )
    tables = [_opened(path) for path in paths]
    if not any(map(len, tables)):
        raise ValueError(f"{folder}: the record there has no rows.")
    notes = [about(table) for table in tables]
    merged = {
        "left_out": sum(note["left_out"] for note in notes),
        "files": {path: sha for note in notes for path, sha in note["files"].items()},
    }
    return _with_note(pyarrow.concat_tables(tables), merged)


def files(folder: str | Path) -> list[Path]:
    """The files of a record in the order of their steps."""
    return sorted(Path(folder).glob("*.parquet"))


def _opened(path: Path) -> pyarrow.Table:
    try:
        table = pyarrow.parquet.read_table(path)
        table.validate(full=True)
    except (*_Errors, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: can't be read ({why}).") from None
    if not table.schema.equals(SCHEMA):
        columns = " ".join(", ".join(table.column_names).split())
        raise ValueError(f"{path}: no record of weights (its columns are {columns:.300}).")
    try:
        about(table)
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path}: damaged: what it says of the whole record is none.") from None
    return table


def _with_note(table: pyarrow.Table, note: dict[str, Any]) -> pyarrow.Table:
    return table.replace_schema_metadata({_KEY: json.dumps(note).encode()})


class Writer:
    """Adds to the record of a folder, on one rank.

    What can't be written is said once; the run goes on, and later steps are written again when
    there is room.

    Args:
        after: the run goes on after this step: what is there of later ones is cut.
        is_new: whether the run can't be one that goes on: then no record may be there.

    Attributes:
        cut: rows that were cut.

    Raises:
        ValueError: the folder can't be written, has other files of Parquet, or, of a new run, a
            record.
    """

    def __init__(self, folder: str | Path, after: int = 0, is_new: bool = False) -> None:
        self._folder, self._said = Path(folder), False
        self._columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        self._note: dict[str, Any] = {"left_out": 0, "files": {}}
        self._steps = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder) as file:
                file.write(b"room?")
            for left in self._folder.glob("*.tmp"):  # of a crash
                left.unlink()
            found = files(folder)
            if found and is_new:
                raise ValueError(
                    f"--dr-record {folder}: the record of another run is there: name another "
                    "folder, or delete it."
                )
            self.cut = sum(_cut(path, after) for path in found)
        except _Errors as error:
            why = getattr(error, "strerror", None) or error
            raise ValueError(f"--dr-record {folder}: can't be written ({why}).") from None

    def add(self, columns: dict[str, list[Any]], left_out: int, sources: dict[str, str]) -> None:
        """A step's rows, by column.

        Args:
            left_out: rows of the step that are not among them.
            sources: sha256 of files that the samples' datasets were prepared from.
        """
        for name, values in columns.items():
            self._columns[name] += values
        self._note["left_out"] += left_out
        self._note["files"] |= sources
        self._steps += 1
        if self._steps >= _STEPS or len(self._columns["step"]) >= _ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last time."""
        columns, note = self._columns, self._note
        if not columns["step"]:
            return
        self._columns = {name: [] for name in SCHEMA.names}
        self._note, self._steps = {"left_out": 0, "files": {}}, 0
        name = f"{columns['step'][0]:09d}-{columns['step'][-1]:09d}.parquet"
        try:
            table = pyarrow.table(columns, SCHEMA)
            _write(_with_note(table, note), self._folder / name)
        except _Errors as error:
            self.say(error)

    def say(self, error: Exception) -> None:
        """What a step's rows were lost to, once."""
        if self._said:
            return
        self._said = True
        why = getattr(error, "strerror", None) or error
        metrics.note(
            f"--dr-record {self._folder}: can't be written ({why}); the run goes on, and the "
            "weights of these steps are lost"
        )


def _write(table: pyarrow.Table, path: Path) -> None:
    """Whole, or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        pyarrow.parquet.write_table(table, unfinished, compression="zstd")
        os.replace(unfinished, path)
    except _Errors:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def _cut(path: Path, after: int) -> int:
    """Take off the steps after this one; how many rows."""
    table = _opened(path)
    kept = table.filter(pyarrow.compute.less_equal(table["step"], after))
    if len(kept) == len(table):
        return 0
    if len(kept):
        _write(kept, path.with_name(f"{path.name[:9]}-{kept['step'][-1].as_py():09d}.parquet"))
    path.unlink()
    return len(table) - len(kept)
