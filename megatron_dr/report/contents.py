"""Whether data is still what a record of weights was made on, and what of it is kept."""

import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow

from megatron_dr.data import records
from megatron_dr.data.files import ending, kind
from megatron_dr.data.identities import content

_TEXT = "text:"


class Recorded:
    """The samples of a file that a record has.

    Args:
        samples: of `weights.samples`.
        file: as the record has it.
        sources: sha256 of files that indexed datasets were prepared from (`record.about`).
        path: where the file is now.

    Raises:
        ValueError: samples without lines or hashes of a text, or a file with another content.
    """

    def __init__(
        self, samples: pyarrow.Table, file: str, sources: dict[str, str], path: Path
    ) -> None:
        self._file, self._path = file, path
        self._by_line: dict[int, tuple[str, float]] = {}
        self._by_hash: dict[str, float] = {}
        self._found: set[str] = set()
        columns = (samples[name].to_pylist() for name in ("file", "line", "hash", "weight"))
        for own, line, hashed, weight in zip(*columns, strict=True):
            if own != file or hashed is None:
                continue
            if line is not None:
                self._by_line.setdefault(line, (hashed, weight))
                self._check(line, hashed, self._by_line[line][0])
            elif hashed.startswith(_TEXT):
                self._by_hash[hashed] = weight
            else:
                raise ValueError(
                    f"the record's slots and ranks of {file} don't say which lines of it they are, "
                    "as it was prepared: record sample rows."
                )
        if any(not hashed.startswith(_TEXT) for hashed, _ in self._by_line.values()):
            self._check_whole(sources.get(file))

    def __len__(self) -> int:
        return len(self._by_line) or len(self._by_hash)

    def weight(self, line: int, raw: Any) -> float | None:
        """Mean weight of a line; None where the record does not know it.

        Raises:
            ValueError: its content is another one.
        """
        if line in self._by_line:
            hashed, weight = self._by_line[line]
            if hashed.startswith(_TEXT):
                self._check(line, hashed, content(records.parse(raw)))
            return weight
        if not self._by_hash:
            return None
        hashed = content(records.parse(raw))
        self._found.add(hashed)
        return self._by_hash.get(hashed)

    def end(self) -> None:
        """All lines were asked for: raise ValueError where the record has more."""
        lost = len(self._by_hash.keys() - self._found)
        if lost:
            raise ValueError(
                f"{self._path}: {lost} of the {len(self._by_hash)} samples that the record has of "
                f"{self._file} are not in it: it is other data, or was changed since."
            )

    def _check(self, line: int, hashed: str, found: str) -> None:
        if found != hashed:
            raise ValueError(
                f"{self._path}:{line}: its content is not what the record has of {self._file}, "
                f"line {line}: it is other data, or was changed since."
            )

    def _check_whole(self, sha256: str | None) -> None:
        with self._path.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != sha256:
            raise ValueError(
                f"{self._path}: its content is not that of {self._file}, which the record's "
                "dataset was prepared from: it is other data, or was changed since."
            )


def check(samples: pyarrow.Table, sources: dict[str, str]) -> list[str]:
    """Files of the record that are not here to be looked at.

    Raises:
        ValueError: one that is, and has another content.
    """
    missing = []
    for file in sorted({file for file in samples["file"].to_pylist() if file is not None}):
        if kind(file) is None:  # of a domain, a dataset's prefix
            continue
        if not os.path.isfile(file):
            missing.append(file)
            continue
        known = Recorded(samples, file, sources, Path(file))
        last = 0
        for last, raw in records.read_file(file) if len(known) else ():
            known.weight(last, raw)
        known.end()
        _check_length(known, last, file)
    return missing


def _check_length(known: Recorded, last: int, path: str | Path) -> None:
    most = max(known._by_line, default=0)
    if most > last:
        raise ValueError(
            f"{path}: it ends with line {last}, and the record has line {most} of it: it is other "
            "data, or was changed since."
        )


def filtered(
    samples: pyarrow.Table, sources: dict[str, str], source: Path, out: Path,
    chooses: Callable[[list[float]], float],
) -> dict[str, int]:  # fmt: skip
    """Write the lines of a JSONL file whose mean weight is above a threshold, as they are.

    Args:
        chooses: the threshold, of the mean weights of the file's samples.

    Returns:
        How many lines are 'kept', 'below' it, and 'unknown': the record has no weight of them, or
        NaN, and they are left out.

    Raises:
        ValueError: no such file, one that the record does not know, has another content, or `out`
            is there.
    """
    if not source.is_file() or not ending(str(source)).startswith(".jsonl"):
        raise ValueError(f"{source}: a file of JSON lines (.jsonl) is needed, and none is there.")
    if out.exists():
        raise ValueError(f"{out}: it is there already: name another file, or delete it.")
    known = Recorded(samples, _same_file(samples, source), sources, source)
    lines, last = [], 0
    for last, raw in records.read_file(str(source)):
        lines.append((raw, known.weight(last, raw)))
    known.end()
    _check_length(known, last, source)
    weights = [weight for _, weight in lines if weight is not None and not math.isnan(weight)]
    if not weights:
        raise ValueError(f"{source}: the record has no weight of any of its lines.")
    threshold = chooses(weights)
    kept = [raw.rstrip(b"\r\n") + b"\n" for raw, w in lines if w is not None and w > threshold]
    unfinished = out.with_name(out.name + ".tmp")
    unfinished.write_bytes(b"".join(kept))
    os.replace(unfinished, out)
    return {
        "kept": len(kept), "below": len(weights) - len(kept), "unknown": len(lines) - len(weights)
    }  # fmt: skip


def _same_file(samples: pyarrow.Table, path: Path) -> str:
    """What the record calls a file: by its path, or by its name where that is one file's."""
    names: list[str] = sorted({file for file in samples["file"].to_pylist() if file is not None})
    same = [name for name in names if Path(name).resolve() == path.resolve()]
    same = same or [name for name in names if Path(name).name == path.name]
    if len(same) != 1:
        found = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise ValueError(
            f"{path}: the record has {'several files of that name' if same else 'no sample of it'} "
            f"(its files: {found or 'none'})."
        )
    return same[0]
